"""What a plan file would do, and what it did: rows of a table, JSON, and Markdown for a CI job's page."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from crdiff_export.errors import CrdiffError
from crdiff_export.formats.text import amount, printable
from crdiff_export.publish.run import Outcome
from crdiff_export.publish.worklist import Item, Survey

# A repository, a tag, and the commit that has it or why it has not.
Tagged = tuple[str, str, str | CrdiffError]

PLANNED = ("base", "size", "ratios", "goes to", "what", "why")
DONE = ("base", "size", "result", "bytes", "commit", "where")
_WORDS = {"make": "make and push", "send": "push", "skip": "nothing", "fail": "cannot"}
_MARKS = {"published": "✅ published", "written": "✅ written", "unchanged": "✅ unchanged", "failed": "❌ failed"}


def planned_notes(found: Survey) -> Iterator[str]:
    """What is worth knowing about the variants that are to be made, each thing once for those of a base."""
    for reading in found.readings:
        yield from _each_once(
            (item, item.plan.notes if item.plan and item.action == "make" else ()) for item in reading.items
        )


def done_notes(found: Survey, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """What is worth knowing of what was made, each thing once for the variants of a base, and of what was pushed."""
    notes = {id(outcome.item.entry): outcome.notes for outcome in outcomes}
    for reading in found.readings:
        yield from _each_once((item, notes.get(id(item.entry), ())) for item in reading.items)
    yield from dict.fromkeys(note for outcome in outcomes if outcome.pushed for note in outcome.pushed.notes)


def _each_once(noted: Iterable[tuple[Item, Sequence[str]]]) -> Iterator[str]:
    """Notes with the first item that each is of."""
    said: dict[str, Item] = {}
    for item, notes in noted:
        for note in notes:
            said.setdefault(note, item)
    yield from (f"{item.entry}: {note}" for note, item in said.items())


def planned_row(item: Item) -> list[str]:
    """An item's row under PLANNED."""
    word = "make" if item.action == "make" and item.destination is None else _WORDS[item.action]
    return [
        _base(item), str(item.entry.size), _ratios(item), where(item), word, printable(item.reason)
    ]  # fmt: skip


def facts(found: Survey) -> Iterator[tuple[str, str]]:
    """What a dry run adds up to."""
    count = {action: sum(item.action == action for item in found.items) for action in ("make", "send", "skip", "fail")}
    yield (
        "variants",
        f"{count['make']} to make, {count['send']} to push, {count['skip']} there, {count['fail']} failing",
    )
    made = [(r.looked, item.plan) for r in found.readings for item in r.items if item.action == "make"]
    fetched = sum({looked.place: looked.size for looked, _ in made if looked and looked.place}.values())
    yield "to fetch", f"at most {amount(fetched)}" if fetched else "nothing"
    sizes = [planned.data_size for _, planned in made if planned]
    yield "to write", f"{amount(sum(sizes))}, {amount(_at_once(found, sizes))} at once"


def _at_once(found: Survey, sizes: Sequence[int]) -> int:
    return sum(sizes) if found.request.keep else max(sizes, default=0)


def planned(found: Survey) -> dict[str, Any]:
    """A dry run for machines."""
    return {"variants": [_item_json(item) | _decision(item) for item in found.items]}


def _decision(item: Item) -> dict[str, Any]:
    notes = list(item.plan.notes) if item.plan else []
    error = _error(item.error) if item.error else None
    return {"action": item.action, "reason": item.reason, "notes": notes, "error": error}


def done_row(outcome: Outcome) -> list[str]:
    """An outcome's row under DONE."""
    item = outcome.item
    size = amount(outcome.size) if outcome.size is not None else "-"
    commit = outcome.commit[:10] if outcome.commit else "-"
    return [_base(item), str(item.entry.size), outcome.status, size, commit, where(item)]


def as_json(outcomes: Sequence[Outcome], tagged: Sequence[Tagged]) -> dict[str, Any]:
    """The report for machines: one object per variant."""
    return {
        "variants": [_outcome_json(outcome) for outcome in outcomes],
        "tags": [
            {"repo": repo, "tag": name, "commit": None if isinstance(what, CrdiffError) else what,
             "error": _error(what) if isinstance(what, CrdiffError) else None}
            for repo, name, what in tagged
        ],
    } | {status: sum(outcome.status == status for outcome in outcomes) for status in _MARKS}  # fmt: skip


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    pushed, plan = outcome.pushed, outcome.item.plan
    notes = [*(plan.notes if plan else ()), *outcome.notes, *(pushed.notes if pushed else ())]
    return _item_json(outcome.item) | {
        "status": outcome.status, "digest": outcome.digest, "bytes": outcome.size, "sha256": outcome.sha256,
        "commit": outcome.commit, "url": pushed.url if pushed else None,
        "pull_request": pushed.pull_request if pushed else None, "notes": notes,
        "error": _error(outcome.error) if outcome.error else None,
    }  # fmt: skip


def _item_json(item: Item) -> dict[str, Any]:
    plan = item.plan
    return {
        "base": item.entry.base, "size": str(item.entry.size), "repo": item.entry.repo,
        "revision": item.destination.revision if item.destination else None, "path": item.path,
        "output": str(item.target), "family": plan.match.family.id if plan else None,
        "ratios": {group: plan.ratio(group) for group in plan.groups} if plan else None,
        "poa_weight": plan.variant.poa_weight if plan else None,
        "provenance": plan.variant.provenance if plan else None, "digest": item.digest,
        "criterion": item.entry.criterion,
        "calibration": str(item.entry.calibration) if item.entry.calibration else None,
        "line": item.entry.line,
    }  # fmt: skip


def _error(error: CrdiffError) -> dict[str, str]:
    return {"code": error.code, "message": error.message, "hint": error.hint}


def in_order(found: Survey, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Outcomes in the plan file's order; what was not reached is not among them."""
    place = {id(item.entry): number for number, item in enumerate(found.items)}
    return sorted(outcomes, key=lambda outcome: place[id(outcome.item.entry)])


def for_github(found: Survey, outcomes: Sequence[Outcome], tagged: Sequence[Tagged]) -> None:
    """Add a table to the page of a GitHub Actions job, where this is one (GITHUB_STEP_SUMMARY)."""
    page = os.environ.get("GITHUB_STEP_SUMMARY")
    if page:
        with contextlib.suppress(OSError), Path(page).open("a", encoding="utf-8") as file:
            file.write(markdown(found, outcomes, tagged))


def markdown(found: Survey, outcomes: Sequence[Outcome], tagged: Sequence[Tagged]) -> str:
    """The report as Markdown."""
    reached = {id(outcome.item.entry) for outcome in outcomes}
    lines = [f"### crdiff publish {_cell(found.matrix.name)}", "", f"| {' | '.join(DONE)} |", "|---" * len(DONE) + "|"]
    for outcome in outcomes:
        base, size, _, data, commit, place = map(_cell, done_row(outcome))
        result = _MARKS[outcome.status] + (f": {_cell(outcome.error.message)}" if outcome.error else "")
        place = f"[{place}]({outcome.pushed.url})" if outcome.pushed else place
        lines.append(f"| {base} | {size} | {result} | {data} | {commit} | {place} |")
    left = [item for item in found.items if id(item.entry) not in reached]
    lines += [f"| {_cell(_base(i))} | {i.entry.size} | ⏹ not reached | - | - | {_cell(where(i))} |" for i in left]
    for repo, name, what in tagged:
        said = f"❌ {_cell(what.message)}" if isinstance(what, CrdiffError) else f"`{what[:10]}`"
        lines += ["", f"Tag {_cell(name)} of {_cell(repo)}: {said}"]
    return "\n".join(lines) + "\n\n"


def _cell(text: str) -> str:
    """Text in a cell of a Markdown table, as it is and nothing else."""
    return "".join(f"\\{c}" if c in "\\|`*_[]<>&~$" else c for c in printable(text))


def _base(item: Item) -> str:
    """A base as a table names it: without the folders of this machine."""
    base = item.entry.base
    return printable(base if base.startswith("hf://") or not Path(base).is_absolute() else Path(base).name)


def _ratios(item: Item) -> str:
    if item.plan is None:
        return "-"
    values = [f"{item.plan.ratio(group):g}" for group in item.plan.groups]
    standing = "" if item.plan.variant.provenance != "starting-point" else " (starting point)"
    criterion = "" if item.entry.criterion == "magnitude" else f", {printable(item.entry.criterion)}"
    return "/".join(values) + standing + criterion


def where(item: Item) -> str:
    """Where a table says that an item goes."""
    if item.destination is None:
        return printable(str(item.target))
    at = f"@{item.destination.revision}" if item.destination.revision != "main" else ""
    return printable(f"{item.destination.repo}{at}/{item.path}")
