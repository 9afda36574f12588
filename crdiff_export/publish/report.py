"""Report what a plan file would do, and what a run did: rows of a table, JSON, and Markdown for a CI job's page."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from crdiff_export.errors import CrdiffError
from crdiff_export.formats.text import WARNING, amount, printable
from crdiff_export.publish.plan_file import PlanEntry
from crdiff_export.publish.run import Outcome, TagResult
from crdiff_export.publish.worklist import WorkItem, Worklist

PLANNED = ("base", "size", "ratios", "goes to", "what", "why")
DONE = ("base", "size", "result", "bytes", "commit", "where")
_ACTIONS = {"make": "make and push", "send": "push", "skip": "nothing", "fail": "cannot"}
_STATUSES = {"published": "✅ published", "written": "✅ written", "unchanged": "✅ unchanged", "failed": "❌ failed"}


def planned_notes(worklist: Worklist) -> Iterator[str]:
    """Yield the notes on variants that will be made, each once for a base."""
    yield from _each_once(worklist, {id(item.entry): item.notes for item in worklist.items if item.action == "make"})


def done_notes(worklist: Worklist, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield the notes on what was made, each once for a base, and on what was pushed.

    Args:
        worklist: What was to do.
        outcomes: What became of it.

    Yields:
        One line for each note.
    """
    yield from _each_once(worklist, {id(outcome.item.entry): outcome.notes for outcome in outcomes})
    yield from dict.fromkeys(note for outcome in outcomes if outcome.pushed for note in outcome.pushed.notes)


def _each_once(worklist: Worklist, notes: Mapping[int, Sequence[str]]) -> Iterator[str]:
    """Yield the notes of entries, by their id; a note on several variants of a base names the first of them."""
    for work in worklist.bases:
        first: dict[str, PlanEntry] = {}
        for item in work.items:
            for note in notes.get(id(item.entry), ()):
                first.setdefault(note, item.entry)
        for note, entry in first.items():
            prefix = WARNING if note.startswith(WARNING) else ""
            yield f"{prefix}{entry}: {note.removeprefix(prefix)}"


def planned_row(item: WorkItem) -> list[str]:
    """Return the row of an item in a table with the columns PLANNED."""
    action = "make" if item.action == "make" and item.destination is None else _ACTIONS[item.action]
    return [_base(item), _size(item), _ratios(item), where(item), action, printable(item.reason)]


def planned_totals(worklist: Worklist) -> Iterator[tuple[str, str]]:
    """Yield names and values of what a dry run adds up to."""
    for name, is_pack in (("variants", False), ("packs", True)):
        items = [item for item in worklist.items if bool(item.entry.pack) == is_pack]
        if items or not is_pack:
            yield name, _counts(items)
    todo = [(work.remote, item) for work in worklist.bases for item in work.items if item.action == "make"]
    to_fetch = sum({remote.location: remote.size for remote, _ in todo if remote and remote.location}.values())
    yield "to fetch", f"at most {amount(to_fetch)}" if to_fetch else "nothing"
    # A pack is counted by its masks; the rest of it takes some KB.
    sizes = [item.plan.data_size for _, item in todo if item.plan]
    sizes += [sum(item.job.mask_bytes.values()) for _, item in todo if item.job]
    at_once = sum(sizes) if worklist.request.keep else max(sizes, default=0)
    yield "to write", f"{amount(sum(sizes))}, {amount(at_once)} at once"


def _counts(items: Sequence[WorkItem]) -> str:
    actions: list[str] = [item.action for item in items]
    words = {"make": "to make", "send": "to push", "skip": "there", "fail": "failing"}
    return ", ".join(f"{actions.count(action)} {word}" for action, word in words.items())


def planned_json(worklist: Worklist) -> dict[str, Any]:
    """Return a dry run for machines."""
    return _by_kind(
        (
            item,
            {"action": item.action, "reason": item.reason, "notes": list(item.notes)}
            | {"error": _error_json(item.error)},
        )
        for item in worklist.items
    )


def _by_kind(results: Iterable[tuple[WorkItem, dict[str, Any]]]) -> dict[str, Any]:
    """Put what is told of items below `variants` and `packs`."""
    kinds: dict[str, Any] = {"variants": [], "packs": []}
    for item, result in results:
        kinds["packs" if item.entry.pack else "variants"].append(_item_json(item) | result)
    return kinds


def done_row(outcome: Outcome) -> list[str]:
    """Return the row of an outcome in a table with the columns DONE."""
    item = outcome.item
    size = amount(outcome.size) if outcome.size is not None else "-"
    commit = outcome.commit[:10] if outcome.commit else "-"
    return [_base(item), _size(item), outcome.status, size, commit, where(item)]


def done_json(outcomes: Sequence[Outcome], tags: Sequence[TagResult]) -> dict[str, Any]:
    """Return a run for machines: one object per variant, pack and tag, and counts.

    Args:
        outcomes: What became of the variants.
        tags: What became of the tags.

    Returns:
        The object to print.
    """
    return (
        _by_kind((outcome.item, _outcome_json(outcome)) for outcome in outcomes)
        | {
            "tags": [
                {"repo": tag.repo, "tag": tag.tag, "commit": tag.commit, "error": _error_json(tag.error)}
                for tag in tags
            ],
        }
        | {status: sum(outcome.status == status for outcome in outcomes) for status in _STATUSES}
    )


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    pushed = outcome.pushed
    notes = [*outcome.item.notes, *outcome.notes, *(pushed.notes if pushed else ())]
    return {
        "status": outcome.status, "digest": outcome.digest, "bytes": outcome.size, "sha256": outcome.sha256,
        "commit": outcome.commit, "url": pushed.url if pushed else None,
        "pull_request": pushed.pull_request if pushed else None, "notes": notes, "error": _error_json(outcome.error),
    }  # fmt: skip


def _item_json(item: WorkItem) -> dict[str, Any]:
    plan, export = item.plan, item.request
    common = {
        "base": export.base, "repo": item.entry.repo,
        "revision": item.destination.revision if item.destination else None, "path": item.path,
        "output": str(item.target), "digest": item.digest, "criterion": export.criterion,
        "calibration": str(export.calibration) if export.calibration else None, "line": item.entry.line,
    }  # fmt: skip
    if item.entry.pack:
        family = item.job.plans[0].match.family.id if item.job else None
        return common | {"sizes": [str(size) for size in item.sizes], "family": family}
    return common | {
        "size": str(export.size), "family": plan.match.family.id if plan else None,
        "ratios": {group: plan.ratio(group) for group in plan.groups} if plan else None,
        "poa_weight": plan.variant.poa_weight if plan else None,
        "provenance": plan.variant.provenance if plan else None,
        "borrowed_from": str(plan.variant.borrowed_from) if plan and plan.variant.borrowed_from else None,
    }  # fmt: skip


def _error_json(error: CrdiffError | None) -> dict[str, str] | None:
    return {"code": error.code, "message": error.message, "hint": error.hint} if error else None


def in_order(worklist: Worklist, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Sort outcomes as the plan file has its variants.

    Args:
        worklist: What was to do.
        outcomes: What became of it, as far as the run came.

    Returns:
        The outcomes, sorted.
    """
    index = {id(item.entry): number for number, item in enumerate(worklist.items)}
    return sorted(outcomes, key=lambda outcome: index[id(outcome.item.entry)])


def write_github_summary(worklist: Worklist, outcomes: Sequence[Outcome], tags: Sequence[TagResult]) -> None:
    """Add a table to the page of a GitHub Actions job, if this is one (GITHUB_STEP_SUMMARY).

    Args:
        worklist: What was to do.
        outcomes: What became of the variants.
        tags: What became of the tags.
    """
    page = os.environ.get("GITHUB_STEP_SUMMARY")
    if page:
        with contextlib.suppress(OSError), Path(page).open("a", encoding="utf-8") as file:
            file.write(markdown(worklist, outcomes, tags))


def markdown(worklist: Worklist, outcomes: Sequence[Outcome], tags: Sequence[TagResult]) -> str:
    """Return the report as Markdown; the arguments are those of `write_github_summary`."""
    reached = {id(outcome.item.entry) for outcome in outcomes}
    lines = [f"### crdiff publish {_cell(worklist.plan.name)}", "", f"| {' | '.join(DONE)} |", "|---" * len(DONE) + "|"]
    for outcome in outcomes:
        base, size, _, data, commit, target = map(_cell, done_row(outcome))
        status = _STATUSES[outcome.status] + (f": {_cell(outcome.error.message)}" if outcome.error else "")
        target = f"[{target}]({outcome.pushed.url})" if outcome.pushed else target
        lines.append(f"| {base} | {size} | {status} | {data} | {commit} | {target} |")
    lines += [
        f"| {_cell(_base(item))} | {_cell(_size(item))} | ⏹ not reached | - | - | {_cell(where(item))} |"
        for item in worklist.items
        if id(item.entry) not in reached
    ]
    for tag in tags:
        result = f"❌ {_cell(tag.error.message)}" if tag.error else f"`{str(tag.commit)[:10]}`"
        lines += ["", f"Tag {_cell(tag.tag)} of {_cell(tag.repo)}: {result}"]
    return "\n".join(lines) + "\n\n"


def _cell(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return "".join(f"\\{c}" if c in "\\|`*_[]<>&~$" else c for c in printable(text))


def _base(item: WorkItem) -> str:
    """The base without the folders of this machine."""
    base = item.request.base
    return printable(base if base.startswith("hf://") or not Path(base).is_absolute() else Path(base).name)


def _size(item: WorkItem) -> str:
    """The size, or how many a pack has."""
    return f"pack of {len(item.sizes)}" if item.entry.pack else str(item.request.size)


def _ratios(item: WorkItem) -> str:
    if item.plan is None:
        return "-"
    values = [f"{item.plan.ratio(group):g}" for group in item.plan.groups]
    variant = item.plan.variant
    origin = " (starting point)" if variant.provenance == "starting-point" else ""
    origin = f" (borrowed from {variant.borrowed_from})" if variant.borrowed_from else origin
    criterion = "" if item.request.criterion == "magnitude" else f", {printable(item.request.criterion)}"
    return "/".join(values) + origin + criterion


def where(item: WorkItem) -> str:
    """Return where an item goes, for a table."""
    if item.destination is None:
        return printable(str(item.target))
    at = f"@{item.destination.revision}" if item.destination.revision != "main" else ""
    return printable(f"{item.destination.repo}{at}/{item.path}")
