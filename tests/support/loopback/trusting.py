"""Trusted publishing: a CI job's own OIDC token for one of the Hub's, which lasts an hour (RFC 8693)."""

import hashlib

from tests.support.loopback.routes import Routes
from tests.support.loopback.state import State
from tests.support.loopback.store import Account
from tests.support.loopback.wire import Answer, Refusal, Request, Violation, as_json

TRUSTING = Routes()
REQUEST_TOKEN = "runner-" + "R" * 20  # what GitHub gives a job that may ask for its own OIDC token
ID_TOKEN = "eyJhbGciOi." + "J" * 24
_GRANT = {
    "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
    "subject_token_type": "urn:ietf:params:oauth:token-type:id_token",
}


@TRUSTING.on("GET", "/runner/id-token", "audience")
def mint(state: State, request: Request) -> Answer:
    """GitHub's side: the job's token, for those whom it is meant for."""
    if request.asks("audience") != state.url:
        raise Violation(400, f"a token for {request.asks('audience')}")
    return as_json({"value": ID_TOKEN})


@TRUSTING.on("POST", "/oauth/token")
def exchange(state: State, request: Request) -> Answer:
    """The Hub's: write access to the one repository that trusts the job."""
    sent = request.fields({**dict.fromkeys(_GRANT, str), "subject_token": str, "resource": str})
    if any(sent[key] != value for key, value in _GRANT.items()):
        raise Violation(400, f"grant {sent}")
    repo = sent["resource"]
    if sent["subject_token"] != ID_TOKEN or repo not in state.repos:
        raise Refusal(400, "invalid_grant")
    token = "hf_jwt_" + hashlib.sha256(repo.encode()).hexdigest()
    state.accounts[token] = Account("[OIDC]", "repo", repos=frozenset({repo}))
    return as_json({"access_token": token, "token_type": "bearer", "expires_in": 3600})
