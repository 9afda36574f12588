"""Change the layout of a checkpoint while it is read: `change.py` is where to begin."""

from crdiff_export.models.layouts.arrange import arrange
from crdiff_export.models.layouts.change import change_layout

__all__ = ["arrange", "change_layout"]
