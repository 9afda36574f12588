"""A clone of the UNet's patcher in Forge's objects of a loaded checkpoint, and how it is taken out again."""

from typing import Any

from crdiff_export.sampling.webui.layers import PrunedLayers


class UnetClone:
    """POA on a clone, which the UI drops when it begins the next sampling; the patcher that was cloned never changes.

    Args:
        objects: The `forge_objects` of the checkpoint.
        note: One line for the user, or nothing.
    """

    def __init__(self, objects: Any, note: str) -> None:
        self._objects, self.note = objects, note
        self._original: Any = None
        self._clone: Any = None
        self._layers: PrunedLayers | None = None

    @property
    def is_on(self) -> bool:
        """Whether POA is on; clones that other scripts made of ours ask for it, too."""
        return self._layers is not None

    def put_on(self, layers: PrunedLayers) -> None:
        """Put a clone in the place of the patcher."""
        self._original, self._layers = self._objects.unet, layers
        self._objects.unet = self._clone = self._original.clone()

    def remove(self) -> None:
        """Take the clone out, unless another script's stands in its place, and turn POA off."""
        if self._layers is None:
            return
        self._layers.release()
        self._layers = None
        if self._objects.unet is self._clone:
            self._objects.unet = self._original
