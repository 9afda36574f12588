"""What a diffusion model predicts (the noise, v, or EDM's denoised picture), by the marks that its files carry.

A model with the same layers may predict something else, and a sampler that does not know it draws black or grey
pictures. Marks: the tensors that ComfyUI looks for (`comfy/supported_models.py`, `SDXL.model_type`), ModelSpec's
`prediction_type`, and the scheduler of a diffusers folder.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, get_args

if TYPE_CHECKING:
    from typing import Self

# The scheduler of diffusers that takes every setting of v-prediction, and the one for EDM with v.
V_SCHEDULER: Final = "EulerDiscreteScheduler"
EDM_V_SCHEDULER: Final = "EDMEulerScheduler"
PredictionKind = Literal["epsilon", "v", "edm", "edm-v", "other"]
PREDICTION_KEY: Final = "modelspec.prediction_type"
SIGMAS: Final = ("edm_vpred.sigma_min", "edm_vpred.sigma_max")
ZERO_SNR: Final = "-zsnr"  # SwarmUI spells `v-zsnr` so
_WORDS: Final[Mapping[str, tuple[PredictionKind, bool | None]]] = {
    "epsilon": ("epsilon", None), "eps": ("epsilon", None), "v": ("v", None), "v_prediction": ("v", None),
    "v-prediction": ("v", None), "vpred": ("v", None), "v-zsnr": ("v", True),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model predicts.

    Attributes:
        kind: `epsilon` or `v`; `edm` or `edm-v` where the model is conditioned on sigma as in EDM (arXiv:2206.00364);
            `other` where the base says something else, such as `flow`, or has marks that cannot be right.
        zero_snr: Whether the last step of its training has no signal at all (arXiv:2305.08891); None if unknown.
        sigmas: The smallest and the largest sigma of an `edm-v` model.
    """

    kind: PredictionKind
    zero_snr: bool | None = None
    sigmas: tuple[float, float] | None = None

    def __str__(self) -> str:
        """Return the value of `crdiff.prediction`."""
        sigmas = "".join(f" {sigma!r}" for sigma in self.sigmas or ())
        return f"{self.kind}{ZERO_SNR if self.zero_snr else ''}{sigmas}"

    @classmethod
    def parse(cls, text: str) -> "Self | None":
        """Read the value of `crdiff.prediction`; None if the text is malformed."""
        word, *numbers = text.split(" ")
        kind = next((kind for kind in get_args(PredictionKind) if kind == word.removesuffix(ZERO_SNR)), None)
        if kind is None:
            return None
        try:
            sigmas = [float(number) for number in numbers]
        except ValueError:
            return None
        if sigmas and not are_sigmas(sigmas):
            return None
        return cls(kind, True if word.endswith(ZERO_SNR) else None, (sigmas[0], sigmas[1]) if sigmas else None)

    @property
    def modelspec(self) -> str | None:
        """ModelSpec's word for it, which knows `v` and `epsilon`; None for EDM."""
        return {"epsilon": "epsilon", "v": "v", "edm-v": "v"}.get(self.kind)

    @property
    def scheduler_settings(self) -> dict[str, object]:
        """The settings of a diffusers scheduler for it: EDM_V_SCHEDULER for `edm-v`; none for `edm` and `other`.

        Sources: CosXL's sampling for `edm-v`; for zero SNR "Common Diffusion Noise Schedules and Sample Steps are
        Flawed" (arXiv:2305.08891), section 3.
        """
        if self.kind in ("edm", "other"):
            return {}
        settings: dict[str, object] = {"prediction_type": "epsilon" if self.kind == "epsilon" else "v_prediction"}
        if self.kind == "edm-v":
            low, high = self.sigmas or (0.002, 120.0)
            settings |= {"sigma_min": low, "sigma_max": high, "sigma_data": 1.0, "sigma_schedule": "exponential"}
        elif self.zero_snr:
            settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return settings


def are_sigmas(numbers: Sequence[float]) -> bool:
    """Whether numbers are a smallest and a largest sigma."""
    return len(numbers) == 2 and 0 < numbers[0] < numbers[1] < math.inf


def by_marks(tensors: Collection[str], metadata: Mapping[str, str]) -> Prediction | None:
    """Tell from the header of a single file what its model predicts.

    Args:
        tensors: The names of its tensors, with their prefix.
        metadata: Its metadata. A tensor says more than a key, as in ComfyUI.

    Returns:
        The prediction without its sigmas; None if the file has no mark.
    """
    if "edm_mean" in tensors and "edm_std" in tensors:
        return Prediction("edm")
    if SIGMAS[1] in tensors:
        return Prediction("edm-v")
    if "v_pred" in tensors:
        return Prediction("v", "ztsnr" in tensors)
    word = metadata.get(PREDICTION_KEY, "").strip().lower()
    kind, zero_snr = _WORDS.get(word, ("other", None))
    if kind == "v" and "ztsnr" in tensors:
        zero_snr = True
    return Prediction(kind, zero_snr) if word else None


def by_scheduler(config: Mapping[str, object]) -> Prediction | None:
    """Tell from the scheduler's configuration in a diffusers folder what its model predicts.

    Args:
        config: The content of `scheduler_config.json`.

    Returns:
        The prediction; None for a scheduler of flow matching, and for one that does not say it.
    """
    is_v = config.get("prediction_type") == "v_prediction"
    if str(config.get("_class_name")).startswith("EDM"):
        return Prediction("edm-v" if is_v else "edm")
    if is_v or config.get("prediction_type") == "epsilon":
        return Prediction("v" if is_v else "epsilon", bool(config.get("rescale_betas_zero_snr")))
    return None
