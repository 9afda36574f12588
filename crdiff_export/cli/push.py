"""`crdiff push`, and how `crdiff export --push` pushes."""

import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import click

from crdiff_export.cli import sheet
from crdiff_export.cli.blocks import Facts
from crdiff_export.cli.command import command, gather, option, option_group
from crdiff_export.cli.options import file_argument, push_options
from crdiff_export.cli.output import Output, Result
from crdiff_export.cli.progress_display import rate_text
from crdiff_export.errors import HubError
from crdiff_export.formats.text import amount
from crdiff_export.publish.commit import PushPlan, PushResult, plan
from crdiff_export.publish.commit import push as send
from crdiff_export.publish.request import (
    PushRequest,
    check_request,
    make_upload,
    path_in_repository,
    prepare,
    read_source_name,
)
from crdiff_export.publish.target import MAIN, Destination
from crdiff_export.publish.upload import Upload


@command(
    "crdiff push sdxl-2048.safetensors my-org/sdxl-crdiff",
    "crdiff push sdxl-2048.safetensors my-org/sdxl-crdiff --tag v1 --public",
    "crdiff push sdxl-2048.safetensors their-org/sdxl --create-pr",
    'crdiff push sdxl-512.safetensors my-org/sdxl-crdiff --preview "a red fox" --dry-run',
    "crdiff push sdxl.crdiff my-org/sdxl-crdiff",
)
@file_argument
@click.argument("repo")
@push_options
@option_group("Hub", option("--dry-run", "Show what would be sent and written, and send nothing."))
@gather("request", PushRequest)
def push(out: Output, file: Path, request: PushRequest, *, previews: tuple[str, ...], dry_run: bool) -> Result:
    """Push FILE to the Hub repository REPO (ORG/NAME), and keep its model card.

    FILE is a baked checkpoint or folder, or a pack. Write access is checked first. The commit holds the file and the
    card; an existing card keeps everything but our part. What the Hub then holds is compared by hash. Nothing is
    committed if it has the file already.
    """
    out.quiet_hub_client()
    check_request(request)
    sheet.check(request, previews, file)
    source = read_source_name(file)
    path_in_repository(request, file)
    base = sheet.base_of(source) if previews else source
    destination = None if dry_run else prepare(request, source, file.name)
    with sheet.with_sheet(out, request, previews, file, base) as complete:
        if destination:
            return push_result(*transfer(out, complete, file, destination))
        with out.threads_progress() as progress:
            upload = make_upload(complete, file, progress)
    return _planned(upload, plan(upload, Destination(request.repo, request.revision or MAIN)), request)


def _planned(upload: Upload, planned: PushPlan, request: PushRequest) -> Result:
    """Describe what a push would do."""
    states = planned.files
    at = "" if planned.exists else ", which does not exist, or cannot be read without a token: it would be created"
    facts = {
        "repository": f"{request.repo} ({request.revision or MAIN}){at}",
        **{path: f"{state}{_size(upload, path)}" for path, state in states.items()},
        **({"tag": request.tag} if request.tag else {}),
    }
    sends = [path for path, state in states.items() if state != "unchanged"]
    record = {
        "dry_run": True, "repo": request.repo, "revision": request.revision or MAIN, "exists": planned.exists,
        "tag": request.tag, "card": planned.card, "notes": list(planned.notes),
        "files": [
            {"path": path, "state": state, "bytes": file.size if (file := upload.files.get(path)) else None,
             "sha256": file.sha256 if file else None}
            for path, state in states.items()
        ],
    }  # fmt: skip
    end = f"would send: {', '.join(sends)}" if sends else "would send nothing: the repository holds all of it"
    return Result(record, [Facts(facts), end], bare=sends, notes=planned.notes)


def _size(upload: Upload, path: str) -> str:
    return f", {amount(upload.files[path].size)}" if path in upload.files else ", the model card"


def transfer(
    out: Output, request: PushRequest, path: Path, destination: Destination, *, checked: bool = False
) -> tuple[Upload, PushResult]:
    """Hash and send what is at a path, with progress; `checked` if its bytes have just been written."""
    with out.threads_progress() as progress:
        upload = make_upload(request, path, progress, checked=checked)
    began = time.monotonic()
    try:
        pushed = send(upload, destination)
    except HubError as error:
        if not checked:
            raise
        again = f"`crdiff push {shlex.quote(str(path))} {request.repo}` is enough"
        raise HubError(error.message, f"{error.hint} As {path} is made, {again}.") from error
    if pushed.changed:
        log_upload(out, upload.size, pushed.repo, time.monotonic() - began)
    return upload, pushed


def log_upload(out: Output, size: int, where: str, seconds: float) -> None:
    """Say that an upload is over; on a terminal the Hub's client has drawn bars of its own."""
    out.log(f"sending: {amount(size)} to {where} in {rate_text(size, seconds)}")


def push_result(upload: Upload, pushed: PushResult) -> Result:
    """Describe a push; the last line is the address that will always lead to these bytes."""
    found = {
        "repo": pushed.repo, "revision": pushed.revision, "commit": pushed.commit, "changed": pushed.changed,
        "tag": upload.tag, "pull_request": pushed.pull_request,
        "files": [
            {"path": path, "bytes": file.size, "sha256": file.sha256, "url": pushed.urls[path]}
            for path, file in upload.files.items()
        ],
        "notes": list(pushed.notes),
    }  # fmt: skip
    return Result(found, [Facts(_facts(upload, pushed)), pushed.url], bare=[pushed.url], notes=pushed.notes)


def _facts(upload: Upload, pushed: PushResult) -> Iterator[tuple[str, str]]:
    yield "repository", f"{pushed.repo} ({pushed.revision})"
    unchanged = "" if pushed.changed else ", which holds it already: no commit was made"
    yield "commit", f"{pushed.commit}{unchanged}"
    if pushed.pull_request:
        yield "pull request", pushed.pull_request
    if upload.tag:
        yield "tag", upload.tag
    files = upload.files
    if len(files) == 1:
        ((path, file),) = files.items()
        yield "file", f"{path} ({amount(file.size)})"
        yield "SHA-256", file.sha256
    else:
        yield "files", f"{len(files)} ({amount(upload.size)})"
