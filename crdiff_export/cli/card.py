"""`crdiff card`."""

from pathlib import Path

import click

from crdiff_export.cli import options
from crdiff_export.cli.command import command, gather, option_group
from crdiff_export.cli.output import Output, Result
from crdiff_export.errors import HubError
from crdiff_export.publish.commit import plan
from crdiff_export.publish.request import PushRequest, check_request, make_upload, read_source_name
from crdiff_export.publish.target import MAIN, Destination

# What stands for the repository in a card that is for none yet.
NO_REPO = "ORG/NAME"


@command(
    "crdiff card sdxl-512.safetensors",
    "crdiff card sdxl-512.safetensors my-org/sdxl-crdiff > README.md",
    "crdiff card sdxl.crdiff",
    short_help="Print the model card of a baked file or a pack, without a push.",
)
@options.file_argument
@click.argument("repo", default=NO_REPO)
@option_group("Hub", options.base_model, options.relation, options.sheet)
@gather("request", PushRequest)
def card(out: Output, file: Path, request: PushRequest) -> Result:
    """Print the model card that a push of FILE, a baked file or a pack, would write, and send nothing.

    For a repository REPO (ORG/NAME) that exists, it is that repository's card with our part brought up to date. The
    licence of the base comes from the Hub; where the Hub cannot be asked, a note says so.
    """
    out.quiet_hub_client()
    check_request(request)
    read_source_name(file)
    with out.threads_progress() as progress:
        upload = make_upload(request, file, progress)
    destination = Destination(request.repo, MAIN)
    try:
        planned = plan(upload, destination, read=request.repo != NO_REPO)
    except HubError as error:
        out.notes([f"the card is one for a new repository: {error.message}"])
        planned = plan(upload, destination, read=False)
    repo = None if request.repo == NO_REPO else request.repo
    record = {"repo": repo, "card": planned.card, "notes": list(planned.notes)}
    return Result(record, [planned.card.removesuffix("\n")], notes=planned.notes)
