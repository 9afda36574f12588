"""`crdiff docs`."""

from pathlib import Path

import click

from crdiff_export.cli.blocks import Table
from crdiff_export.cli.command import command
from crdiff_export.cli.output import Output, Result
from crdiff_export.errors import OptionError

# A wheel has the pages inside of the package, a checkout beside it.
_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "docs", _PACKAGE.parent / "docs")


@command("crdiff docs", "crdiff docs families | less", short_help="List the pages of the documentation, or print one.")
@click.argument("page", required=False)
def docs(_out: Output, page: str | None) -> Result:
    """List the pages of the documentation, or print PAGE, which is Markdown."""
    pages = _pages()
    if page is None:
        rows = [[name, _title(path)] for name, path in pages.items()]
        record = {"pages": [{"name": name, "title": _title(path)} for name, path in pages.items()]}
        return Result(record, [Table(["page", "title"], rows)], bare=list(pages))
    name = page.removesuffix(".md")
    if name not in pages:
        from crdiff_export.formats.text import did_you_mean

        raise OptionError(f"no page is called {page!r}", did_you_mean(name, tuple(pages), "pages"))
    text = pages[name].read_text(encoding="utf-8")
    return Result({"page": name, "text": text}, [text.rstrip("\n")])


def _pages() -> dict[str, Path]:
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.md"), key=lambda path: path.stem)} if folder else {}


def _title(path: Path) -> str:
    with path.open(encoding="utf-8") as lines:
        return next((line.removeprefix("# ").strip() for line in lines if line.startswith("# ")), path.stem)
