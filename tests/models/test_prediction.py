"""What a model predicts, by tensors, by the header, by a folder's scheduler."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crdiff_export import ExportRequest, Size, export
from crdiff_export.models.prediction import PREDICTION_KEY, Prediction, by_marks, by_scheduler
from tests.support import makers

V, ZERO = Prediction("v", False), Prediction("v", True)


@pytest.mark.parametrize(
    ("tensors", "stated", "expected"),
    [
        ((), None, None),
        ((), "v", Prediction("v")),
        ((), "V_Prediction", Prediction("v")),
        ((), "v-zsnr", Prediction("v", True)),
        ((), "epsilon", Prediction("epsilon")),
        ((), "flow", Prediction("other")),
        (("v_pred",), "flow", V),
        (("ztsnr",), "v", ZERO),
        (("v_pred",), None, V),
        (("v_pred", "ztsnr"), None, ZERO),
        (("ztsnr",), None, None),
        (("v_pred", "ztsnr"), "epsilon", ZERO),  # a tensor says more than a key
        (("edm_mean", "edm_std"), "v", Prediction("edm")),
        (("edm_mean",), None, None),
        (("edm_vpred.sigma_max", "edm_vpred.sigma_min", "v_pred"), None, Prediction("edm-v")),
        (("model.diffusion_model.v_pred",), None, None),
    ],
)
def test_marks_of_a_file(tensors: Collection[str], stated: str | None, expected: Prediction | None) -> None:
    assert by_marks({*tensors, "other"}, {PREDICTION_KEY: stated} if stated else {}) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}, Prediction("epsilon", False)),
        ({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, V),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, ZERO),
        ({"_class_name": "DDIMScheduler", "prediction_type": "sample"}, None),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, None),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, Prediction("edm-v")),
        ({"_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "epsilon"}, Prediction("edm")),
    ],
)
def test_a_folders_scheduler(config: dict[str, Any], expected: Prediction | None) -> None:
    assert by_scheduler(config) == expected


@pytest.mark.parametrize(
    ("prediction", "text"),
    [
        (Prediction("epsilon"), "epsilon"), (Prediction("v"), "v"), (ZERO, "v-zsnr"), (Prediction("edm"), "edm"),
        (Prediction("edm-v", sigmas=(0.002, 120.0)), "edm-v 0.002 120.0"),
    ],
)  # fmt: skip
def test_the_header_holds_it(prediction: Prediction, text: str) -> None:
    assert str(prediction) == text
    assert Prediction.parse(text) == prediction


@pytest.mark.parametrize("text", ["", "x", "v 1", "edm-v a b", "v-zsnr-zsnr", "edm-v 1 2 3"])
def test_other_texts_say_nothing(text: str) -> None:
    assert Prediction.parse(text) is None


@pytest.mark.parametrize(
    ("marks", "header", "told", "modelspec"),
    [
        ({"v_pred": 0, "ztsnr": 0}, {}, "v-zsnr", "v"),
        ({"v_pred": 0}, {PREDICTION_KEY: "epsilon"}, "v", "v"),  # a tensor says more than a key
        ({"v_pred": 0}, {PREDICTION_KEY: "vpred"}, "v", "vpred"),
        ({"edm_mean": 4, "edm_std": 4}, {PREDICTION_KEY: "epsilon"}, "edm", None),
        ({"edm_mean": 4, "edm_std": 4}, {}, "edm", None),
        ({"edm_vpred.sigma_min": 1, "edm_vpred.sigma_max": 1}, {}, "edm-v 0.5 80.0", "v"),
        ({"edm_vpred.sigma_max": 1}, {}, "other", None),
        ({"edm_vpred.sigma_min": 2, "edm_vpred.sigma_max": 1}, {}, "other", None),
        ({"edm_vpred.sigma_min": 0, "edm_vpred.sigma_max": 0}, {}, "other", None),
        ({}, {PREDICTION_KEY: "flow"}, "other", "flow"),
        ({}, {PREDICTION_KEY: "v"}, "v", "v"),
        ({}, {}, None, None),
    ],
)
def test_an_export_says_what_is_proven(
    here: Path, marks: dict[str, int], header: dict[str, str], told: str | None, modelspec: str | None
) -> None:
    tensors = dict(makers.tiny("sdxl.original"))
    for name, count in marks.items():
        number = 80.0 if name.endswith("max") else 0.5
        tensors[name] = "F32", (count,), np.full(count, number, "<f4").tobytes()
    makers.write(here / "base.safetensors", tensors, header)
    written = export(ExportRequest("base.safetensors", Size(512, 512), Path("o.safetensors"))).written
    keys = makers.metadata_of(written.path)
    assert (keys.get("crdiff.prediction"), keys.get(PREDICTION_KEY)) == (told, modelspec)
    assert marks.keys() <= makers.read(written.path).keys()


def test_an_export_of_a_folder_says_what_its_scheduler_says(here: Path) -> None:
    (here / "base/unet").mkdir(parents=True)
    (here / "base/scheduler").mkdir()
    makers.write(here / "base/unet/diffusion_pytorch_model.safetensors", makers.tiny("sdxl.diffusers-unet"))
    config = {
        "_class_name": "EulerDiscreteScheduler",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    }
    (here / "base/scheduler/scheduler_config.json").write_text(json.dumps(config))
    written = export(ExportRequest("base", Size(512, 512), Path("o"))).written
    keys = makers.metadata_of(written.files[0].path)
    assert (keys["crdiff.prediction"], keys[PREDICTION_KEY]) == ("v-zsnr", "v")
