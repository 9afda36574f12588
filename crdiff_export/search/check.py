"""The check of a search's best trial: drawn and scored beside the dense model, on pairs that the search never saw."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version

from crdiff_export import evaluate
from crdiff_export.evaluate import evidence, scorers
from crdiff_export.evaluate.request import Subject
from crdiff_export.formats.text import printable
from crdiff_export.models.recipe import Evidence, Scalar, Variant
from crdiff_export.progress import Progress
from crdiff_export.prune.criterion_choice import MAGNITUDE
from crdiff_export.prune.plan import Plan, with_ratios
from crdiff_export.search.prepare import SearchJob
from crdiff_export.search.result import SearchResult

# Of a ratio: finer ones differ by less than chance, and what is checked is what the recipe says.
DIGITS = 4


def check_best(result: SearchResult, progress: Progress) -> SearchResult:
    """Return the result with its check, and with the variant that was checked."""
    gc.collect()  # the search's pipeline, whose modules and hooks hold each other; there may be no room for two
    job = result.job
    plan = plan_of_best(result)
    subjects = tuple(_subjects(job, plan))
    request = job.request
    check = evaluate.EvaluateRequest(
        request.base, (request.size,), scorer=job.scorer, pictures=job.pairs.pictures, seed=job.pairs.check[0][1],
        steps=request.steps, guidance=request.guidance, negative=request.negative, scorer_device=job.scorer_device,
        told_size=request.told_size,
    )  # fmt: skip
    evaluation = evaluate.draw(
        evaluate.EvaluateJob(
            check, job.drawing, plan, job.criterion, subjects, job.pairs.check, job.batch, job.scorer,
            job.scorer_device, outputs=(), notes=job.notes,
        ),
        result.counted,
        progress,
    )  # fmt: skip
    variant = replace(
        plan.variant,
        source=_source(result, evaluation.scorer),
        evidence=_evidence(result, evidence.measured(evaluation, subjects[0])),
    )
    return replace(result, evaluation=evaluation, subject=subjects[0], variant=variant)


def plan_of_best(result: SearchResult) -> Plan:
    """Return the plan of the best trial, in numbers rounded for a recipe."""
    job, candidate = result.job, result.best.candidate
    most = 1 - 10**-DIGITS
    ratios = {group: min(round(ratio, DIGITS), most) for group, ratio in candidate.ratios}
    plan = with_ratios(job.plan, ratios)
    if not any(scope.rank for scope in plan.scopes):
        plan = with_ratios(job.plan, candidate.by_group)
    weight = 1.0 if candidate.poa_weight is None else round(candidate.poa_weight, DIGITS)
    variant = Variant(
        resolution=job.request.size,
        ratios=plan.variant.ratios,
        poa_weight=weight,
        provenance="searched",
        source=_source(result, scorers.public(job.scorer)),
        targets=job.plan.kinds if job.request.targets else job.plan.variant.targets,
        prompt=job.request.prompt,
    )
    return replace(plan, variant=variant)


def _subjects(job: SearchJob, plan: Plan) -> Iterator[Subject]:
    """Yield the size that was searched for, and the native one, where the same ratios may hurt."""
    yield Subject.of_plan(plan.size, plan, ())
    if job.request.native and plan.size != job.drawing.native:
        yield Subject.of_plan(job.drawing.native, plan, ())


def _source(result: SearchResult, scorer: str) -> str:
    """Say where the numbers come from, by a scorer's public name: what was typed may be a path."""
    job = result.job
    method = job.setup.method
    by = "POA at the weight found" if job.setup.space.poa_weights else "the pruned model alone"
    paper = ", the box and constants of the public code" if job.request.paper else ""
    by += "" if job.criterion.name == MAGNITUDE else f" with {job.criterion.name}"
    drawn = f"{len(job.pairs.search)} pictures"
    return (
        f"crdiff search: {method.name}{paper}, seed {method.seed}, the best of {len(result.trials)} trials "
        f"(number {result.best.number}), by {printable(scorer)} of {by}, {drawn}"
    )


def _evidence(result: SearchResult, measured: Evidence | None) -> Evidence:
    """Return what the check measured, and how the search came to it."""
    assert measured
    job = result.job
    extra: dict[str, Scalar] = {
        **measured.extra,
        "base": printable(job.drawing.base.name),
        "method": job.setup.method.name,
        "trials": len(result.trials),
        "searched_pairs": len(job.pairs.search),
        "searched_pairs_sha256": evidence.pairs_digest(job.pairs.search),
        "transformers": version("transformers"),
    }
    return replace(measured, extra=extra)
