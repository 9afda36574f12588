"""A base's own marks decide how it is sampled, whatever the configuration beside it says."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from crdiff_export import Size
from crdiff_export.errors import PreviewError
from crdiff_export.evaluate.preview import PreviewRequest, preview
from crdiff_export.models import demo
from crdiff_export.models.prediction import Prediction
from crdiff_export.sampling.scheduler import scheduler_change
from tests.support.messages import raises

EPSILON = {"_class_name": "PNDMScheduler", "prediction_type": "epsilon"}
EULER = {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon"}
RIGHT = {
    "_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}  # fmt: skip
EDM = {"_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "epsilon"}


@pytest.mark.parametrize(
    ("prediction", "config", "change"),
    [
        (Prediction("epsilon"), EPSILON, None),
        (Prediction("epsilon"), RIGHT, {"prediction_type": "epsilon"}),
        (Prediction("epsilon", False), RIGHT, {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}),
        (Prediction("v"), RIGHT, None),
        (Prediction("v", True), RIGHT, None),
        (Prediction("v"), EULER, {"prediction_type": "v_prediction"}),
        (Prediction("v", False), EULER, {"prediction_type": "v_prediction"}),
        (
            Prediction("v", True), EULER,
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        ),
        (Prediction("edm"), EDM, None),
    ],
)  # fmt: skip
def test_only_what_is_wrong_changes(
    prediction: Prediction, config: dict[str, Any], change: dict[str, Any] | None
) -> None:
    made = scheduler_change(prediction, config, "base")
    assert made == (None if change is None else (config["_class_name"], change))


def test_an_edm_model_of_v_gets_its_own_scheduler() -> None:
    made = scheduler_change(Prediction("edm-v", sigmas=(0.01, 80.0)), EULER, "base")
    assert made
    assert made[0] == "EDMEulerScheduler"
    assert (made[1]["sigma_min"], made[1]["sigma_max"], made[1]["prediction_type"]) == (0.01, 80.0, "v_prediction")


def test_a_prediction_that_is_not_known_is_not_drawn_with() -> None:
    with raises(PreviewError, "base"):
        scheduler_change(Prediction("other"), EULER, "base")


@pytest.mark.parametrize(
    ("kind", "config"), [("edm", EULER), ("v", EDM), ("epsilon", EDM)], ids=["edm", "v", "epsilon"]
)
def test_a_configuration_of_another_kind_is_refused(kind: Any, config: dict[str, Any]) -> None:
    with raises(PreviewError, "base", config["_class_name"]) as error:
        scheduler_change(Prediction(kind), config, "base")
    assert "--config" in error.value.hint


# --- pictures ---


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo base, which predicts v with zero terminal SNR, with the tensors that say so."""
    folder = tmp_path_factory.mktemp("marked")
    tensors = {**load_file(demo.path()), "v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    save_file(tensors, folder / "v.safetensors", metadata={"format": "pt"})
    return folder


def configured(folder: Path, name: str, **changes: Any) -> Path:
    """The demo's configuration with another scheduler."""
    made = shutil.copytree(demo.config(), folder / name)
    path = made / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return made


def pictures(base: Path, config: Path, output: Path) -> list[bytes]:
    request = PreviewRequest(
        str(base), ("a red circle left of a blue square on white",), Size(48, 48), ratio=0.3, steps=2,
        config=str(config), outputs=(output,), force=True,
    )  # fmt: skip
    return [picture.image.tobytes() for picture in preview(request).pictures]


@pytest.mark.parametrize(
    "changes",
    [
        {"prediction_type": "epsilon"},
        {"prediction_type": "epsilon", "rescale_betas_zero_snr": False, "timestep_spacing": "leading"},
        {"rescale_betas_zero_snr": False},
    ],
    ids=["prediction", "all", "terminal SNR"],
)
@pytest.mark.usefixtures("one_thread")
def test_pictures_are_those_of_the_right_configuration(marked: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    wrong, right = configured(tmp_path, "wrong", **changes), configured(tmp_path, "right")
    drawn = pictures(marked / "v.safetensors", wrong, tmp_path / "w.png")
    assert drawn == pictures(marked / "v.safetensors", right, tmp_path / "r.png")
    assert drawn == pictures(demo.path(), right, tmp_path / "d.png")
    unmarked = tmp_path / "u.safetensors"
    save_file(load_file(demo.path()), unmarked)  # without a mark the configuration is followed
    assert drawn != pictures(unmarked, wrong, tmp_path / "u.png")


@pytest.mark.usefixtures("one_thread")
def test_a_scheduler_that_knows_no_zero_snr_gives_way_to_one_that_does(marked: Path, tmp_path: Path) -> None:
    pndm = configured(tmp_path, "pndm", _class_name="PNDMScheduler", prediction_type="epsilon")
    euler = configured(tmp_path, "euler", _class_name="EulerDiscreteScheduler")
    index = json.loads((pndm / "model_index.json").read_text())
    for folder, name in ((pndm, "PNDMScheduler"), (euler, "EulerDiscreteScheduler")):
        (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", name]}))
    base = marked / "v.safetensors"
    assert pictures(base, pndm, tmp_path / "p.png") == pictures(base, euler, tmp_path / "e.png")


def test_a_configuration_of_another_kind_is_refused_before_a_weight_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    tensors = {**load_file(demo.path()), "edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}
    save_file(tensors, tmp_path / "edm.safetensors")
    monkeypatch.delattr(diffusers, "StableDiffusionPipeline", raising=False)
    with pytest.raises(PreviewError):
        pictures(tmp_path / "edm.safetensors", demo.config(), tmp_path / "e.png")
