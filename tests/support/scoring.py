"""Repositories of scorers in a folder, pictures of many sizes, and scores as numbers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crdiff_export import hub
from crdiff_export.evaluate.scorers import Scorer
from crdiff_export.evaluate.scorers.weights import Fetch, Repo
from crdiff_export.hub.location import HubLocation

Fetched = list[tuple[str, str | None, str | None]]


def fetch_from(shelf: Path) -> Fetch:
    """Fetch from repositories that lie in a folder by their ids."""

    def fetch(repo: Repo, file: str | None) -> Path:
        return shelf / repo.id / file if file else shelf / repo.id

    return fetch


def serve(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Fetched:
    """Put those repositories in the Hub's place; the list that is returned grows by repository, file and commit."""
    fetched: Fetched = []

    def fetch(location: HubLocation, *_: object) -> Path:
        fetched.append((location.repo, location.file, location.revision))
        return shelf / location.repo / (location.file or "")

    monkeypatch.setattr(hub, "fetch", fetch)
    monkeypatch.setattr(hub, "fetch_parts", fetch)
    return fetched


def noise(sizes: Sequence[tuple[int, int]], seed: int) -> list[Image.Image]:
    """Pictures of these widths and heights."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for width, height in sizes]


def values(scorer: Scorer, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """The scores as numbers."""
    return [score.value for score in scorer.score(images, prompts)]
