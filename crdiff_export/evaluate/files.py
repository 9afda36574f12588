"""What an evaluation is written to: a page with its pictures, a plot, a recipe that carries the evidence."""

from collections.abc import Sequence
from dataclasses import replace as with_changes
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from crdiff_export.errors import OptionError
from crdiff_export.evaluate import evidence
from crdiff_export.evaluate.findings import Evaluation
from crdiff_export.evaluate.report import outputs
from crdiff_export.models import recipe_files, recipe_toml
from crdiff_export.models.recipe import Recipe

KINDS: Final = (".html", ".png", ".svg", ".toml")
_DRAWN: Final = (".html", ".png", ".svg")


def check(asked: Sequence[Path], *, force: bool) -> tuple[Path, ...]:
    """The files to write; PlanError or OptionError where one must not or cannot be."""
    found = outputs.check(asked, KINDS, "neither a page (HTML), a plot (PNG, SVG) nor a recipe (TOML)", force=force)
    if any(path.suffix.lower() in _DRAWN for path in found) and find_spec("matplotlib") is None:
        raise OptionError("matplotlib is not installed, which plots need", '`pip install "crdiff-export[search]"`.')
    return found


def write(found: Evaluation, paths: Sequence[Path], *, replace: bool) -> None:
    """Write all of them, then give them their names."""

    def save(part: Path, kind: str) -> None:
        if kind == ".toml":
            part.write_text(recipe_toml.dump(recipe(found, "")), encoding="utf-8")
            return
        from crdiff_export.evaluate import page, plot

        if kind == ".html":
            part.write_text(page.render(found), encoding="utf-8")
        else:
            part.write_bytes(plot.draw(found, kind.removeprefix(".")))

    outputs.write(paths, save, replace=replace)


def recipe(found: Evaluation, name: str) -> Recipe:
    """The family's recipe with the variants that were measured, each with what was found."""
    known = recipe_files.by_alias(found.family)
    assert known
    variants = tuple(evidence.variant(found, subject) for subject in found.subjects if not subject.is_look)
    return with_changes(known, variants=variants, name=name)
