"""The files of an evaluation: a page with its pictures, a plot, a recipe that carries the evidence."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from crdiff_export.evaluate import evidence
from crdiff_export.evaluate.report import outputs, plots
from crdiff_export.evaluate.results import Evaluation
from crdiff_export.models import recipe_files, recipe_toml
from crdiff_export.models.recipe import Recipe

SUFFIXES: Final = (".html", ".png", ".svg", ".toml")


def check(paths: Sequence[Path], *, force: bool) -> tuple[Path, ...]:
    """Return the files to write; PlanError or OptionError where one of them must not or cannot be written."""
    what = "neither a page (HTML), a plot (PNG, SVG) nor a recipe (TOML)"
    files = outputs.check(paths, SUFFIXES, what, force=force)
    plots.check_matplotlib(files)
    return files


def write(evaluation: Evaluation) -> None:
    """Write the requested files, all or none; each has its name only once it is complete.

    Args:
        evaluation: What they show.

    Raises:
        BakeError: A file could not be written.
    """
    from crdiff_export.evaluate import page, plot

    makers: outputs.Makers = {
        ".html": lambda: page.render(evaluation),
        ".png": lambda: plot.render(evaluation, "png"),
        ".svg": lambda: plot.render(evaluation, "svg"),
        ".toml": lambda: recipe_toml.dump(recipe(evaluation, "")),
    }
    outputs.write(evaluation.job.outputs, makers, replace=evaluation.job.request.force)


def recipe(evaluation: Evaluation, name: str) -> Recipe:
    """Return the family's recipe with the variants that were measured, each with its evidence."""
    plan = evaluation.job.plan
    family = recipe_files.of_family(plan.match.family, plan.size)
    family = replace(family, native=family.native or evaluation.job.drawing.native)
    subjects = [subject for subject in evaluation.subjects if not subject.is_native_check]
    variants = tuple(evidence.variant(evaluation, subject) for subject in subjects)
    return replace(family, variants=variants, name=name)
