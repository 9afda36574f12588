"""The texts on a search, while it runs and in the end: nothing is called better unless its interval says so."""

from crdiff_export.evaluate import scorers
from crdiff_export.formats.text import plural, printable
from crdiff_export.models.evidence_text import decimals
from crdiff_export.search.result import SearchResult
from crdiff_export.search.space import Candidate
from crdiff_export.search.trials import SearchProgress, TrialEvent


def candidate_text(candidate: Candidate) -> str:
    """Return a candidate's numbers."""
    if candidate.dense:
        return "dense"
    weight = [] if candidate.poa_weight is None else [f"POA {candidate.poa_weight:.2f}"]
    return ", ".join([*(f"{group} {ratio:.3f}" for group, ratio in candidate.ratios), *weight])


def event_text(event: TrialEvent, progress: SearchProgress) -> str | None:
    """Return a line for an event that people want to know; None for others.

    Args:
        event: What happened.
        progress: How far the search is.

    Returns:
        A line such as `trial 3: down 0.480, mid 0.310, up 0.011: 0.4095 (4 of 5 over)`.

    """
    if event.kind in ("waiting", "ended"):
        return None if event.note is None else f"{event.note}: {progress_text(progress)}"
    if event.number is None or event.candidate is None or event.kind in ("started", "scored"):
        return None
    number = f"trial {event.number}"
    if event.kind == "retried":
        return f"{number}: tried again ({event.note})"
    if event.kind in ("lost", "failed"):
        return f"{number}: {event.note}"
    score = "" if event.value is None else f"{event.value:.4f}"
    early = f" after {event.done} of {event.pairs} pictures, stopped early" if event.kind == "pruned" else ""
    return f"{number}: {candidate_text(event.candidate)}: {score}{early} ({progress_text(progress)})"


def resumed_text(progress: SearchProgress) -> str | None:
    """Return a line on a search that goes on; None for one that begins."""
    return f"going on with {plural(progress.over, 'finished trial')} in {progress.where}" if progress.over else None


def progress_text(progress: SearchProgress) -> str:
    """Return how far the search is."""
    of = "" if progress.trials is None else f" of {progress.trials}"
    parts = [f"{progress.over}{of} over"]
    if progress.best and progress.best.value is not None:
        parts.append(f"best {progress.best.value:.4f}")
    if progress.dense and progress.dense.value is not None:
        parts.append(f"dense {progress.dense.value:.4f}")
    if progress.left:
        parts.append(f"{duration(progress.left)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Return a time to wait, in seconds, as precisely as people need it."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def facts(result: SearchResult) -> tuple[tuple[str, str], ...]:
    """Return what everybody who sees the result should know, as labels and texts."""
    job = result.job
    method, space = job.setup.method, job.setup.space
    states = [trial.state for trial in result.trials]
    stopped = f", {states.count('pruned')} of them stopped early" if "pruned" in states else ""
    failed = f", {states.count('failed')} failed" if "failed" in states else ""
    box = f"ratios {space.low:g} to {space.high:g}"
    weights = (
        ", POA weights {:g} to {:g}".format(*space.poa_weights) if space.poa_weights else ", the pruned model alone"
    )
    prompts = len({prompt for prompt, _ in job.pairs.search})
    pictures = plural(len(job.pairs.search), "picture")
    best = result.best
    check = dict(result.evaluation.facts) if result.evaluation else {}
    return (
        ("base", f"{printable(job.drawing.base.name)} ({job.plan.match.family.title}) at {job.request.size}"),
        ("search", f"{method.name}, seed {method.seed}, {box}{weights}"),
        ("trials", f"{len(states)}{stopped}{failed}, kept in {result.where}"),
        ("judged by", f"{printable(scorers.public(job.scorer))}, {pictures} of {plural(prompts, 'prompt')}"),
        ("dense", f"{result.dense.value:.4f} in the search"),
        ("best", f"{best.value:.4f} in the search, trial {best.number}: {candidate_text(best.candidate)}"),
        *((("check", f"held out: {check['pictures']}"),) if "pictures" in check else ()),
        *((name, check[name]) for name in ("sampling", "negative", "intervals", "drawn on", "made by")
          if name in check),
    )  # fmt: skip


def conclusion(result: SearchResult) -> str:
    """Return the conclusion of a search in one sentence."""
    if result.verdict == "dense is best":
        of = plural(len(result.trials), "trial")
        return f"the dense model scored highest of {of}: there is nothing to recommend, and no recipe was written"
    if not (result.finding and result.finding.difference):
        return "this worker checked nothing; whoever ends the search without --worker does"
    name, change = result.finding.model.name, result.finding.difference
    form = f"+.{decimals(change.high - change.low if change.bounded else 0.0)}f"
    value, ends = f"{change.value:{form}}", f" (95 %: {change.low:{form}} to {change.high:{form}})"
    where = _where(result)
    if change.verdict == "better":
        return f"{where}, {name} is better than dense: {value}{ends}"
    if change.verdict == "worse":
        return f"{where}, {name} is worse than dense: {value}{ends}; no recipe was written"
    if change.verdict == "too few to say":
        return f"{where}, too few for an interval: whether {name} does any good is not known ({value})"
    return f"{where}, no difference between {name} and dense is shown: {value}{ends}"


def _where(result: SearchResult) -> str:
    pairs = result.job.pairs.check
    prompts = len({prompt for prompt, _ in pairs})
    if result.job.request.prompt is not None:
        return f"on {plural(len(pairs), 'held-out picture')}"
    return f"on {plural(prompts, 'held-out prompt')}"
