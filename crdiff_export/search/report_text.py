"""What is said about a search, while it runs and in the end: nothing is better unless its interval says so."""

from typing import TYPE_CHECKING

from crdiff_export.evaluate import scorers
from crdiff_export.formats.text import plural, printable
from crdiff_export.search.found import Found, Standing
from crdiff_export.search.space import Candidate

if TYPE_CHECKING:
    from crdiff_export.search.engine import Event


def spelled(candidate: Candidate) -> str:
    """A candidate's numbers."""
    if candidate.dense:
        return "dense"
    weight = [] if candidate.poa_weight is None else [f"POA {candidate.poa_weight:.2f}"]
    return ", ".join([*(f"{group} {ratio:.3f}" for group, ratio in candidate.ratios), *weight])


def trial(event: "Event", standing: Standing) -> str | None:
    """A line for a trial that is over, or for what else people want to know; None for what they do not."""
    if event.kind in ("waiting", "ended"):
        return None if event.note is None else f"{event.note}: {progressed(standing)}"
    if event.place is None or event.candidate is None or event.kind in ("started", "scored"):
        return None
    number = f"trial {event.place}"
    if event.kind == "orphaned":
        return f"{number}: its worker died; it is tried again"
    if event.kind in ("lost", "failed"):
        return f"{number}: {event.note}"
    score = "" if event.value is None else f"{event.value:.4f}"
    early = f" after {event.done} of {event.pairs} pictures, stopped early" if event.kind == "pruned" else ""
    return f"{number}: {spelled(event.candidate)}: {score}{early} ({progressed(standing)})"


def resumed(standing: Standing) -> str | None:
    """What to say to whoever comes to a search that has begun."""
    return f"going on with {plural(standing.over, 'finished trial')} in {standing.where}" if standing.over else None


def progressed(standing: Standing) -> str:
    """How far the search is."""
    of = "" if standing.trials is None else f" of {standing.trials}"
    said = [f"{standing.over}{of} over"]
    if standing.best and standing.best.value is not None:
        said.append(f"best {standing.best.value:.4f}")
    if standing.dense and standing.dense.value is not None:
        said.append(f"dense {standing.dense.value:.4f}")
    if standing.left:
        said.append(f"{duration(standing.left)} left")
    return ", ".join(said)


def duration(seconds: float) -> str:
    """A time to wait, as precisely as anyone needs it."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def facts(found: Found) -> tuple[tuple[str, str], ...]:
    """What everybody who sees the result should know."""
    job = found.job
    method, space = job.setup.method, job.setup.space
    states = [one.state for one in found.trials]
    stopped = f", {states.count('pruned')} of them stopped early" if "pruned" in states else ""
    failed = f", {states.count('failed')} failed" if "failed" in states else ""
    box = f"ratios {space.low:g} to {space.high:g}"
    weights = ", POA weights {:g} to {:g}".format(*space.weights) if space.weights else ", the pruned model alone"
    prompts = len({prompt for prompt, _ in job.pairs.search})
    pictures = plural(len(job.pairs.search), "picture")
    of_check = dict(found.evaluation.facts) if found.evaluation else {}
    return (
        ("base", f"{printable(job.drawing.base.name)} ({job.plan.match.family.title}) at {job.request.size}"),
        ("search", f"{method.name}, seed {method.seed}, {box}{weights}"),
        ("trials", f"{len(states)}{stopped}{failed}, kept in {found.where}"),
        ("judged by", f"{printable(scorers.public(job.scorer))}, {pictures} of {plural(prompts, 'prompt')}"),
        ("dense", f"{found.dense.value:.4f} in the search"),
        ("best", f"{found.best.value:.4f} in the search, trial {found.best.place}: {spelled(found.best.candidate)}"),
        *((("check", f"held out: {of_check['pictures']}"),) if "pictures" in of_check else ()),
        *((name, of_check[name]) for name in ("sampling", "negative", "intervals", "drawn on", "made by")
          if name in of_check),
    )  # fmt: skip


def conclusion(found: Found) -> str:
    """The one sentence that matters."""
    if found.verdict == "dense is best":
        of = plural(len(found.trials), "trial")
        return f"the dense model scored highest of {of}: there is nothing to recommend, and no recipe was written"
    if not (found.finding and found.finding.difference):
        return "this worker checked nothing; whoever ends the search without --worker does"
    name, change = found.finding.model.name, found.finding.difference
    ends = f", 95 % {change.low:+.3f} to {change.high:+.3f}"
    where = _where(found)
    if change.verdict == "better":
        return f"{where}, {name} is better than dense: {change.value:+.3f}{ends}"
    if change.verdict == "worse":
        return f"{where}, {name} is worse than dense: {change.value:+.3f}{ends}; no recipe was written"
    if change.verdict == "too few to say":
        return f"{where}, too few for an interval: whether {name} does any good is not known ({change.value:+.3f})"
    return f"{where}, no difference between {name} and dense is shown: {change.value:+.3f}{ends}"


def _where(found: Found) -> str:
    pairs = found.job.pairs.check
    prompts = len({prompt for prompt, _ in pairs})
    one = found.job.request.prompt is not None
    return f"on {plural(len(pairs), 'held-out picture') if one else plural(prompts, 'held-out prompt')}"
