"""What commands that draw pictures share: how they find a base, what they ask of it, what ranking tells them."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crdiff_export import ExportRequest, Size, calibrate, evaluate
from crdiff_export.calibrate import CalibrateRequest
from crdiff_export.cli import search
from crdiff_export.errors import OptionError, PlanError
from crdiff_export.evaluate import EvaluateRequest, page, preview
from crdiff_export.evaluate.preview import PreviewRequest
from crdiff_export.export import plan_variant
from crdiff_export.formats.checkpoint import open_checkpoint
from crdiff_export.formats.hashing import hash_file
from crdiff_export.hub import bases
from crdiff_export.models import demo
from crdiff_export.progress import Progress
from crdiff_export.prune import criteria
from crdiff_export.search import SearchRequest, tune
from crdiff_export.search import prepare as prepare_search
from tests.support import criteria_makers, makers

SIZE = Size(48, 48)


pytestmark = pytest.mark.usefixtures("one_thread")


DRAWING: dict[str, Callable[[str, Any], object]] = {
    "calibrate": lambda base, how: calibrate.prepare(
        CalibrateRequest(base, Size(512, 512), ("wanda",), prompts=("a",), **how)
    ),
    "evaluate": lambda base, how: evaluate.prepare(
        EvaluateRequest(base, (Size(512, 512),), scorer="clip-score", prompts=("a",), **how)
    ),
    "preview": lambda base, how: preview.prepare(PreviewRequest(base, ("a",), Size(512, 512), **how)),
    "search": lambda base, how: prepare_search(
        SearchRequest(base, Size(512, 512), scorer="clip-score", prompts=("a", "b", "c"), **how)
    ),
}


@pytest.mark.parametrize("command", DRAWING)
def test_a_base_that_only_a_cast_makes_fit(command: str, tmp_path: Path) -> None:
    """An export is told of --dtype; here that is what a pipeline computes in, and helps nobody."""
    base = makers.write(tmp_path / "double.safetensors", makers.tiny("sd15.original", "F64"))
    config = tmp_path / "conf"
    config.mkdir()
    (config / "model_index.json").write_text("{}")
    with pytest.raises(PlanError, match="is F64, which cannot be pruned") as error:
        DRAWING[command](str(base), {"config": str(config), "dtype": "fp32"})
    assert error.value.hint == (
        "Save it as F32, F16, BF16, F8_E4M3, F8_E5M2 first: --dtype is what the pipeline computes in, not the base's."
    )


@pytest.mark.parametrize("command", ["evaluate", "preview", "search"])
def test_nothing_is_fetched_for_a_criterion_that_cannot_be(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "locate", lambda *_: pytest.fail("a base was looked for"))
    with pytest.raises(OptionError, match="wanda needs a calibration"):
        DRAWING[command]("sd15", {"criterion": "wanda"})


@pytest.mark.parametrize("command", ["evaluate", "search"])
def test_a_calibration_is_hashed_once_and_what_ranking_shows_is_told(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_variant(ExportRequest("demo", SIZE, ratio=0.3), open_checkpoint(demo.path()))
    statistics = criteria_makers.calibrated(plan, ("gram",))
    spoilt = next(iter(statistics))
    gram = np.full_like(statistics[spoilt]["gram"], 1.05)
    np.fill_diagonal(gram, 1)
    statistics[spoilt] = {"gram": gram}
    file = criteria_makers.write_calibration(tmp_path / "c.safetensors", plan, statistics, {"size": str(SIZE)})
    read: list[Path] = []

    def watched(path: Path, progress: Progress) -> str:
        read.append(path)
        return hash_file(path, progress)

    monkeypatch.setattr(criteria.calibration, "hash_file", watched)
    how: dict[str, Any] = {"criterion": "obs:compensate=off", "calibration": file, "steps": 1, "native": False}
    if command == "search":
        paths = (tmp_path / "found.toml",)
        sought = tune(SearchRequest("demo", SIZE, limit=2, held_out_limit=2, trials=3, low=0.2, outputs=paths, **how))
        assert read == [file]
        (note,) = [text for text in search._as_json(sought)["notes"] if "damping" in text]
        assert note.endswith(f"to at most 0.1 ({spoilt})")
        return
    made = evaluate.evaluate(EvaluateRequest("demo", (SIZE,), limit=2, ratio=0.3, weights=(1.0,), **how))
    assert made.job.criterion.calibration
    assert made.job.criterion.calibration.hash == f"0x{hashlib.sha256(file.read_bytes()).hexdigest()}"
    assert read == [file]
    (note,) = [text for text in made.notes if "damping" in text]
    assert note.startswith("obs: damping was raised for 1 of ")
    assert note in page.render(made)
    assert note.endswith(f"to at most 0.1 ({spoilt})")
