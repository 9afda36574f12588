"""A baked file or pack as the adapters use it: the parts of a model's weights for the size of a picture."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from crdiff_export.errors import PoaError
from crdiff_export.packs import SUFFIX, Pack, open_pack
from crdiff_export.sampling.comfyui import match
from crdiff_export.sampling.comfyui.match import Parts
from crdiff_export.sampling.poa.masks import Masks
from crdiff_export.sampling.poa.mix import Schedule
from crdiff_export.sampling.poa.packed import choose
from crdiff_export.sampling.webui.settings import Settings
from crdiff_export.sizes import Size
from crdiff_export.verify import BakedCheckpoint, open_baked

if TYPE_CHECKING:
    from typing import Self

# Pixels of a latent's cell, of which A1111 and its forks count what they cut.
_CELL = 8


class Applied(Protocol):
    """POA on a UI's model.

    Attributes:
        note: One line for the user, such as that a pack has no size near the picture's; else empty.
    """

    note: str

    def remove(self) -> None:
        """Take POA off the model, whose weights are as before then; a second call does nothing."""


@dataclass(frozen=True, slots=True)
class PicturePruning:
    """How a model is pruned for a picture.

    Attributes:
        parts: The parts of every pruned weight by its key, which begins with `diffusion_model.`; empty for a model that
            stays dense.
        schedule: The weight at each moment of sampling.
        label: The file, and the size that was taken of a pack, for messages.
        note: One line for the user, or nothing.
    """

    parts: Parts
    schedule: Schedule
    label: str
    note: str = ""


class PoaFile:
    """A baked file or pack that was opened.

    Args:
        path: The file.
        opened: What it holds.
    """

    def __init__(self, path: Path, opened: BakedCheckpoint | Pack) -> None:
        self.path, self._opened = path, opened
        self._masks: Masks | None = None

    @classmethod
    def open(cls, path: Path) -> "Self":
        """Open a file; CrdiffError if it is damaged or crdiff did not make it."""
        return cls(path, open_pack(path) if path.name.endswith(SUFFIX) else open_baked(path))

    def _read_masks(self, baked: BakedCheckpoint) -> Masks:
        """Read the masks for the first picture and keep them."""
        self._masks = self._masks or match.read_masks(baked)
        return self._masks

    def pruning(self, weights: Mapping[str, Any], size: Size, settings: Settings) -> PicturePruning:
        """Compare a model with the file, and make the parts of its pruned weights.

        Args:
            weights: The model's own weights, without LoRA, by their names in the original layout with the prefix
                `diffusion_model.`.
            size: The size of the picture in this pass.
            settings: What the user chose.

        Returns:
            How the model is pruned.

        Raises:
            CrdiffError: The model is not the one that the file was made from, or the numbers are no part of sampling.

        """
        opened = self._opened
        if isinstance(opened, BakedCheckpoint):
            parts = match.model_parts(weights, opened, self._read_masks)
            return PicturePruning(parts, _schedule(settings, opened.stamp.poa_weight), self.path.name)
        if any(stamp.scaled for stamp in opened.variants.values()):
            raise PoaError(
                f"{self.path.name}: its base has fp8 codes with a scale, which this UI loads in its own way",
                "Take the pack of a base without such codes.",
            )
        layers, chosen = match.find_layers(weights, opened), choose(opened, size)
        if chosen.size is None:
            return PicturePruning({}, Schedule(0.0), self.path.name, chosen.note)
        schedule = _schedule(settings, opened.variants[chosen.size].poa_weight)
        parts = match.pack_parts(layers, opened, chosen.size, {})
        return PicturePruning(parts, schedule, f"{self.path.name} for {chosen.size}", chosen.note)


def picture_size(p: Any) -> Size:
    """Return the size of the picture in the pass that a UI's processing object is in.

    Args:
        p: The processing object of A1111 or one of its forks.

    Returns:
        The second pass's size in hires fix, else that of the picture.

    """
    if getattr(p, "is_hr_pass", False):  # it is enlarged to cover a size of another aspect, and then cut
        return Size(
            int(p.hr_upscale_to_x) - _CELL * getattr(p, "truncate_x", 0),
            int(p.hr_upscale_to_y) - _CELL * getattr(p, "truncate_y", 0),
        )
    return Size(int(p.width), int(p.height))


def fraction_done(p: Any) -> float:
    """Return the fraction of a pass's sampling that is done, as the UI itself counts it; 0 at the first step.

    Args:
        p: The processing object of A1111 or one of its forks.

    Returns:
        A fraction from 0 to below 1.

    """
    denoiser = p.sampler.model_wrap_cfg
    return min(float(denoiser.step) / max(int(denoiser.total_steps), 1), 1 - 1e-6)


def _schedule(settings: Settings, recommended: float) -> Schedule:
    return Schedule(recommended if settings.weight is None else settings.weight, settings.start, settings.stop)
