"""`crdiff push`."""

import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from crdiff_export.cli.options import examples, output_options, push_options, quiet_client
from crdiff_export.cli.signals import Stopper
from crdiff_export.errors import HubError
from crdiff_export.formats.text import amount
from crdiff_export.publish.commit import Pushed
from crdiff_export.publish.request import (
    PushRequest,
    check_request,
    place,
    prepare,
    send,
    source_name,
)
from crdiff_export.publish.request import upload as collect
from crdiff_export.publish.target import Destination
from crdiff_export.publish.upload import Upload


@click.command(
    epilog=examples(
        "crdiff push sdxl-2048.safetensors my-org/sdxl-crdiff",
        "crdiff push sdxl-2048.safetensors my-org/sdxl-crdiff --tag v1 --public",
        "crdiff push sdxl-2048.safetensors their-org/sdxl --create-pr",
    )
)
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("repo")
@push_options
@output_options
@click.pass_obj
def push(stopper: Stopper, /, file: Path, repo: str, *, json: bool, quiet: bool, **options: Any) -> None:
    """Push FILE, a baked checkpoint or folder, to the Hub repository REPO (ORG/NAME), and keep its model card.

    Write access is checked first. The commit holds the file and the card; an existing card keeps everything but our
    part. What the Hub then holds is compared by hash. Nothing is committed if it has the file already.
    """
    request = PushRequest(repo, **options)
    check_request(request)
    quiet_client(quiet=quiet or json)
    base = source_name(file)
    place(request, file)
    destination = prepare(request, base, file.name)
    upload, pushed = transfer(request, file, destination, stopper, quiet=quiet or json)
    show(upload, pushed, as_json=json, quiet=quiet)


def transfer(
    request: PushRequest, path: Path, destination: Destination, stopper: Stopper, *, quiet: bool, checked: bool = False
) -> tuple[Upload, Pushed]:
    """Hash and send what is at a path, with progress; `checked` where its bytes have just been written."""
    from crdiff_export.cli import output

    with output.progress(quiet=quiet) as shown, stopper.watch(shown) as progress:
        upload = collect(request, path, progress, checked=checked)
    began = time.monotonic()
    try:
        pushed = send(upload, destination)
    except HubError as error:
        if not checked:
            raise
        again = f"`crdiff push {shlex.quote(str(path))} {request.repo}` is enough"
        raise HubError(error.message, f"{error.hint} As {path} is made, {again}.") from error
    if pushed.changed and not quiet:
        output.sent(upload.size, pushed.repo, time.monotonic() - began)
    return upload, pushed


def describe(upload: Upload, pushed: Pushed) -> dict[str, Any]:
    """A push for machines."""
    return {
        "repo": pushed.repo, "revision": pushed.revision, "commit": pushed.commit, "changed": pushed.changed,
        "tag": upload.tag, "pull_request": pushed.pull_request,
        "files": [
            {"path": path, "bytes": file.size, "sha256": file.sha256, "url": pushed.urls[path]}
            for path, file in upload.files.items()
        ],
        "notes": list(pushed.notes),
    }  # fmt: skip


def show(upload: Upload, pushed: Pushed, *, as_json: bool, quiet: bool) -> None:
    """What has come of a push; the last line is the address that will always lead to these bytes."""
    from crdiff_export.cli import output

    if as_json:
        output.print_json(describe(upload, pushed))
        return
    if not quiet:
        for note in pushed.notes:
            output.note(note)
        output.facts(tuple(_facts(upload, pushed)))
    output.line(pushed.url)


def _facts(upload: Upload, pushed: Pushed) -> Iterator[tuple[str, str]]:
    yield "repository", f"{pushed.repo} ({pushed.revision})"
    held = "" if pushed.changed else ", which holds it already: no commit was made"
    yield "commit", f"{pushed.commit}{held}"
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
