"""Trusted publishing: a CI job's own OIDC token for one of the Hub's, which lasts an hour (RFC 8693)."""

import hashlib

from tests.support.loopback.routes import Routes
from tests.support.loopback.state import State
from tests.support.loopback.store import Account
from tests.support.loopback.wire import Answer, Refusal, Request, Violation, as_json

TRUSTING = Routes()
REQUEST_TOKEN = "runner-" + "R" * 20  # what GitHub gives a job that may ask for its own OIDC token
ID_TOKEN = "eyJhbGciOi." + "J" * 24


@TRUSTING.on("GET", "/runner/id-token", "audience")
def mint(hub: State, request: Request) -> Answer:
    """GitHub's side: the job's token, for those whom it is meant for."""
    if request.query.get("audience") != hub.url:
        raise Violation(400, f"a token for {request.query.get('audience')}")
    return as_json({"value": ID_TOKEN})


@TRUSTING.on("POST", "/oauth/token")
def exchange(hub: State, request: Request) -> Answer:
    """The Hub's: write access to the one repository that trusts the job."""
    body = request.json()
    repo = body["resource"]
    if body["subject_token"] != ID_TOKEN or repo not in hub.repositories:
        raise Refusal(400, "invalid_grant")
    token = "hf_jwt_" + hashlib.sha256(repo.encode()).hexdigest()
    hub.accounts[token] = Account("[OIDC]", "repo", repos=frozenset({repo}))
    return as_json({"access_token": token, "token_type": "bearer", "expires_in": 3600})
