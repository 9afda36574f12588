"""The check of what a search found: drawn and scored beside the dense model, on pairs that the search never saw."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

from crdiff_export import evaluate
from crdiff_export.evaluate import evidence, scorers
from crdiff_export.evaluate.results import Subject
from crdiff_export.formats.text import printable
from crdiff_export.hub import bases
from crdiff_export.models import recipe_files
from crdiff_export.models.recipe import Evidence, Recipe, Scalar, Variant
from crdiff_export.progress import Progress
from crdiff_export.prune.criteria.spec import Spec
from crdiff_export.prune.criterion_choice import MAGNITUDE
from crdiff_export.prune.plan import Plan, with_ratios
from crdiff_export.search.found import Found

if TYPE_CHECKING:
    from crdiff_export.search.tuning import Job

DIGITS = 4  # of a ratio: finer ones differ by less than chance; what is checked is what the recipe says


def count(found: Found) -> None:
    """Find the thresholds of what will be checked, for which weights may have to be read again, in several threads."""
    found.counted.source(settled(found))


def checked(found: Found, progress: Progress) -> Found:
    """The same with its check, and the variant that was checked."""
    gc.collect()  # the search's pipeline, whose modules and hooks hold each other; there may be no room for two
    job = found.job
    planned = settled(found)
    subjects = tuple(_subjects(job, planned))
    request = job.request
    asked = evaluate.EvaluateRequest(
        request.base, (request.size,), scorer=job.scorer, pictures=job.pairs.pictures, seed=job.pairs.check[0][1],
        steps=request.steps, guidance=request.guidance, negative=request.negative, scorer_device=job.scorer_device,
    )  # fmt: skip
    made = evaluate.draw(
        evaluate.EvaluateJob(
            asked, job.drawing, planned, job.criterion, subjects, job.pairs.check, job.batch, job.scorer,
            job.scorer_device, outputs=(), notes=job.notes,
        ),
        found.counted,
        progress,
    )  # fmt: skip
    variant = replace(
        planned.variant,
        source=_source(found, made.scorer),
        evidence=_evidence(found, evidence.measured(made, subjects[0])),
    )
    return replace(found, evaluation=made, subject=subjects[0], variant=variant)


def settled(found: Found) -> Plan:
    """The plan of the best trial, in numbers that are fit to be written down."""
    job, candidate = found.job, found.best.candidate
    most = 1 - 10**-DIGITS
    ratios = {group: min(round(ratio, DIGITS), most) for group, ratio in candidate.ratios}
    planned = with_ratios(job.plan, ratios)
    if not any(scope.rank for scope in planned.scopes):
        planned = with_ratios(job.plan, candidate.by_group)
    weight = 1.0 if candidate.poa_weight is None else round(candidate.poa_weight, DIGITS)
    variant = Variant(
        resolution=job.request.size,
        ratios=planned.variant.ratios,
        poa_weight=weight,
        provenance="searched",
        source=_source(found, scorers.public(job.scorer)),
        targets=job.plan.kinds if job.request.targets else job.plan.variant.targets,
        prompt=job.request.prompt,
    )
    return replace(planned, variant=variant)


def recipe(found: Found) -> Recipe:
    """The family's recipe with what was found as its one variant; it names a base on the Hub if that was searched."""
    job = found.job
    family = job.plan.match.family.id
    known = recipe_files.by_alias(family)
    assert known
    assert found.variant
    place = bases.hub_uri(job.request.base)
    if place is None or place != bases.hub_uri(family):
        known = replace(known, repo=None, file=None)
    return replace(known, variants=(found.variant,), name=next((p.name for p in job.outputs), ""))


def _subjects(job: "Job", planned: Plan) -> Iterator[Subject]:
    """The size that was searched for; and the native one, where the same ratios may hurt."""
    yield Subject.of_plan(planned.size, planned, ())
    if job.request.native and planned.size != job.drawing.native:
        yield Subject.of_plan(job.drawing.native, planned, ())


def _source(found: Found, scorer: str) -> str:
    """Where the numbers come from. A scorer's own name is fit for others; what was typed may be a path."""
    job = found.job
    method = job.setup.method
    by = "POA at the weight found" if job.setup.space.weights else "the pruned model alone"
    paper = ", the box and constants of the public code" if job.request.paper else ""
    criterion = str(Spec.parse(job.request.criterion))
    by += "" if criterion == MAGNITUDE else f" with {criterion}"
    drawn = f"{len(job.pairs.search)} pictures"
    return (
        f"crdiff search: {method.name}{paper}, seed {method.seed}, the best of {len(found.trials)} trials "
        f"(number {found.best.place}), by {printable(scorer)} of {by}, {drawn}"
    )


def _evidence(found: Found, measured: Evidence | None) -> Evidence:
    """What the check measured, and how the search came to it."""
    from crdiff_export.search.objective import pairs_digest

    assert measured
    job = found.job
    extra: dict[str, Scalar] = {
        **measured.extra,
        "base": printable(job.drawing.base.name),
        "method": job.setup.method.name,
        "trials": len(found.trials),
        "searched_pairs": len(job.pairs.search),
        "searched_pairs_sha256": pairs_digest(job.pairs.search),
        "transformers": version("transformers"),
    }
    return replace(measured, extra=extra)
