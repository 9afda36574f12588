"""A search in its storage: begin it or join it, and what came out so far."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from optuna.exceptions import DuplicatedStudyError
from optuna.study import StudyDirection

from crdiff_export.errors import SearchError
from crdiff_export.formats.text import did_you_mean
from crdiff_export.search import anneal
from crdiff_export.search.board import Board, Finished
from crdiff_export.search.journal import SUFFIX
from crdiff_export.search.ledger import Ledger
from crdiff_export.search.methods import Method
from crdiff_export.search.space import Candidate, Point, Space
from crdiff_export.search.storage import Storage, open_storage, speaking

ATTRIBUTE: Final = "crdiff"
SCHEMA: Final = 1
PATIENCE: Final = 10.0  # seconds between a study's beginning and its settings, after which whoever began it is dead
DENSE: Final = 0
START: Final = 1


@dataclass(frozen=True, slots=True)
class Setup:
    """What is searched: the box, the recipe's variant, how many pairs judge a candidate, and the method."""

    space: Space
    start: Candidate
    pairs: int
    method: Method

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise SearchError("there is nothing to judge a candidate by", "Give at least one prompt and one seed.")
        self.space.require(self.start)

    @property
    def point(self) -> Point:
        """Where the recipe's variant lies."""
        return self.space.point(self.start)

    def settings(self) -> dict[str, str]:
        """The parts that have to agree between all who work on a study."""
        method, space = self.method, self.space
        found = {
            "groups": ", ".join(space.groups),
            "ratios": f"{space.low!r} to {space.high!r}",
            "POA weights": "{!r} to {!r}".format(*space.weights) if space.weights else "none",
            "start": ", ".join(f"{name} {at!r}" for name, at in zip(space.names, self.point, strict=True)),
            "pairs": str(self.pairs),
            "method": method.name,
            "search seed": str(method.seed),
            "pruning": "yes" if method.prunes else "no",
        }
        if method.name == "anneal":
            found["annealing"] = ", ".join(f"{name} {value!r}" for name, value in asdict(method.constants).items())
        return found

    def to_json(self) -> dict[str, Any]:
        """All of it, for a storage."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """What `to_json` gave; a KeyError, TypeError, ValueError or SearchError for anything else."""
        space, start, method = dict(value["space"]), value["start"], dict(value["method"])
        space["groups"] = tuple(space["groups"])
        space["weights"] = None if space["weights"] is None else tuple(space["weights"])
        ratios = tuple((str(group), float(ratio)) for group, ratio in start["ratios"])
        method["constants"] = anneal.Constants(**method["constants"])
        return cls(Space(**space), Candidate(ratios, start["poa_weight"]), int(value["pairs"]), Method(**method))


@dataclass(frozen=True, slots=True)
class Study:
    """A search that can be worked on and asked; close it, or use it in a `with`."""

    name: str
    setup: Setup
    fingerprint: Mapping[str, str]
    ledger: Ledger

    @property
    def where(self) -> str:
        """What it is kept in, without a password."""
        return self.ledger.storage.where

    def close(self) -> None:
        """Give connections back."""
        self.ledger.storage.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_study(storage: str | Path | None, name: str, setup: Setup, fingerprint: Mapping[str, str]) -> Study:
    """Begin a search, or join one that others work on or that was stopped.

    SearchError, naming what differs, if it was begun with another setup or fingerprint.
    """
    opened = open_storage(storage, name)
    try:
        study_id, new = _begin(opened, name)
        mine = {"schema": SCHEMA, "fingerprint": dict(fingerprint), "setup": setup.to_json()}
        entry = None if new else _wait(opened, study_id, name)
        if entry is None:
            entry = mine
            with speaking(opened.where):
                opened.optuna.set_study_user_attr(study_id, ATTRIBUTE, mine)
        began, prints = _read(opened, name, entry)
        _agree(name, {**prints, **began.settings()}, {**fingerprint, **setup.settings()})
    except BaseException:
        opened.close()
        raise
    return Study(name, setup, prints, Ledger(opened, study_id, name, setup.space))


def check(storage: str | Path, name: str, setup: Setup) -> None:
    """SearchError where `open_study` would refuse the storage or the setup; nothing is begun."""
    path = Path(storage)
    if "://" not in str(storage) and path.suffix == SUFFIX and not path.exists():
        return
    opened = open_storage(storage, name, create=False)
    try:
        if name in _names(opened):
            with speaking(opened.where):
                study_id = opened.optuna.get_study_id_from_name(name)
            if (entry := _entry(opened, study_id)) is not None:
                _agree(name, _read(opened, name, entry)[0].settings(), setup.settings())
    finally:
        opened.close()


def load_study(storage: str | Path, name: str) -> Study:
    """Open a search that was begun, with whatever setup it has, to ask what came out."""
    opened = open_storage(storage, name, create=False)
    try:
        setup, prints, study_id = _load(opened, name)
    except BaseException:
        opened.close()
        raise
    return Study(name, setup, prints, Ledger(opened, study_id, name, setup.space))


def _load(opened: Storage, name: str) -> tuple[Setup, dict[str, str], int]:
    names = _names(opened)
    if name not in names:
        hint = did_you_mean(name, names, "searches in it") if names else "There is none in it."
        raise SearchError(f"{opened.where} has no search {name!r}", hint)
    with speaking(opened.where):
        study_id = opened.optuna.get_study_id_from_name(name)
    return *_read(opened, name, _entry(opened, study_id)), study_id


def study_names(storage: str | Path) -> tuple[str, ...]:
    """The searches that a storage holds."""
    opened = open_storage(storage, "", create=False)
    try:
        return _names(opened)
    finally:
        opened.close()


def history(study: Study) -> tuple[Finished, ...]:
    """All places that are over, in order: 0 is the dense model, 1 the recipe's variant."""
    return finished(study.ledger.board(), study.setup.space)


def finished(board: Board, space: Space) -> tuple[Finished, ...]:
    """The places of a board that are over."""
    found = []
    for place in board.places:
        last = place.last
        if place.over and last.state != "running":
            found.append(
                Finished(
                    place=last.place, number=last.number, state=last.state, candidate=space.candidate(last.point),
                    value=last.value, scores=last.scores, seconds=last.seconds, worker=last.worker, chain=last.chain,
                    attempts=len(place.attempts), reason=last.reason,
                )
            )  # fmt: skip
    return tuple(found)


def best(study: Study) -> Finished | None:
    """The complete trial with the highest mean over all pairs, the earliest of several; None before the first."""
    found = [one for one in history(study) if one.value is not None]
    return max(found, key=lambda one: (one.value, -one.place), default=None)


def dense(study: Study) -> Finished | None:
    """The dense model's trial, once it is complete."""
    found = history(study)[:1]
    return next((one for one in found if one.place == DENSE and one.value is not None), None)


def time_left(study: Study, trials: int) -> float | None:
    """Seconds until so many trials are over, at the pace so far of those who work now; None before the first."""
    board = study.ledger.board()
    taken = [one.seconds for one in finished(board, study.setup.space) if one.seconds is not None]
    left = trials - sum(place.over for place in board.places)
    if left <= 0:
        return 0.0
    workers = sum(place.running for place in board.places)
    return sum(taken) / len(taken) * left / max(1, workers) if taken else None


def _names(opened: Storage) -> tuple[str, ...]:
    with speaking(opened.where):
        return tuple(sorted(study.study_name for study in opened.optuna.get_all_studies()))


def _begin(opened: Storage, name: str) -> tuple[int, bool]:
    """The study's number, and whether it is new: of several who begin it at once one alone is told so."""
    with speaking(opened.where):
        if name in _names(opened):
            return opened.optuna.get_study_id_from_name(name), False
        try:
            return opened.optuna.create_new_study([StudyDirection.MAXIMIZE], name), True
        except DuplicatedStudyError:
            return opened.optuna.get_study_id_from_name(name), False


def _entry(opened: Storage, study_id: int) -> Any:
    with speaking(opened.where):
        return opened.optuna.get_study_user_attrs(study_id).get(ATTRIBUTE)


def _wait(opened: Storage, study_id: int, name: str) -> Any:
    """The settings of a study that someone else began, perhaps this moment; None if they died before they wrote any."""
    until = time.monotonic() + PATIENCE
    while (entry := _entry(opened, study_id)) is None:
        with speaking(opened.where):
            if opened.optuna.get_all_trials(study_id, deepcopy=False):
                _read(opened, name, None)
        if time.monotonic() > until:
            return None
        time.sleep(0.05)
    return entry


def _read(opened: Storage, name: str, entry: Any) -> tuple[Setup, dict[str, str]]:
    try:
        if entry["schema"] != SCHEMA:
            message = f"{opened.where}: {name!r} was begun by another version of crdiff"
            raise SearchError(message, "Go on with that version, or begin a new search under another name.")
        prints = {str(key): str(value) for key, value in entry["fingerprint"].items()}
        return Setup.from_json(entry["setup"]), prints
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        hint = "Give the search another name."
        raise SearchError(f"{opened.where}: {name!r} is no search of crdiff", hint) from error


def _agree(name: str, began: Mapping[str, str], now: Mapping[str, str]) -> None:
    keys = sorted(key for key in {*began, *now} if began.get(key) != now.get(key))
    if keys:
        told = "; ".join(f"{key} was {began.get(key, 'not set')}, now {now.get(key, 'not set')}" for key in keys)
        hint = "Repeat what it was begun with, or give the new search another name."
        raise SearchError(f"the search {name!r} cannot go on with other settings: {told}", hint)
