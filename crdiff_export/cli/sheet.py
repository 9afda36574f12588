"""The picture that a push takes along: drawn by the command line, handed to the push as a file."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from crdiff_export.cli import drawing
from crdiff_export.cli.output import Output
from crdiff_export.errors import OptionError
from crdiff_export.hub import bases
from crdiff_export.hub.location import parse_uri
from crdiff_export.packs import is_pack
from crdiff_export.publish.request import NO_PICTURE, PushRequest, check_sheet_of

_HINT = "Draw it with `crdiff preview BASE --baked FILE --prompt TEXT -o sheet.png`, and give --sheet sheet.png."


@contextmanager
def with_sheet(
    out: Output, request: PushRequest, prompts: Sequence[str], baked: Path, base: str, family: Path | None = None,
    variant: str | None = None,
) -> Iterator[PushRequest]:  # fmt: skip
    """Draw the sheet of a push, if prompts are given; it lasts until the block ends.

    Args:
        out: Shows the progress.
        request: The push.
        prompts: What to draw.
        baked: The baked file.
        base: Its base.
        family: The table of the base's family, if it is not built in.
        variant: The weights of a base that is a folder with several.

    Yields:
        The push with its sheet.

    Raises:
        OptionError: There is a sheet already.
        CrdiffError: The sheet cannot be drawn.
    """
    if not prompts:
        yield request
        return
    from crdiff_export.evaluate.preview import PreviewRequest, draw, measure, prepare, write

    with TemporaryDirectory(prefix="crdiff-") as folder:
        sheet = Path(folder) / "sheet.png"
        wanted = PreviewRequest(
            base, prompts=tuple(prompts), baked=baked, outputs=(sheet,), family=family, variant=variant
        )
        job = drawing.prepare(out, wanted, prepare, lambda job: [f"a sheet for the card, {drawing.device_text(job)}"])
        with out.progress() as display:
            with out.stopper.watch(display) as progress:
                source = measure(job, progress)
            write(draw(job, source, display))
        yield replace(request, sheet=sheet)


def check(request: PushRequest, prompts: Sequence[str], path: Path | None = None) -> None:
    """Raise OptionError where a sheet is both given and to be drawn, or is for a pack at a path."""
    if prompts and request.sheet:
        raise OptionError("--sheet and --preview do not go together", "Leave one of them out.")
    if path:
        check_sheet_of(request, path)
        if prompts and is_pack(path):
            raise OptionError(f"--preview: draws one size, {path.name} is a pack of several", NO_PICTURE)


def base_of(source_name: str) -> str:
    """Return how to open the base that a header names; raises OptionError for a local file."""
    if source_name in bases.BUILT_IN or parse_uri(source_name):
        return source_name
    raise OptionError(f"--preview: the base is called {source_name!r}, which may be anywhere", _HINT)
