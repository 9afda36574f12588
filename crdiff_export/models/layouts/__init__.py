"""Change the layout of a checkpoint while it is read: `change.py` is where to begin."""

from crdiff_export.models.layouts.arrange import arrange
from crdiff_export.models.layouts.change import CONFIG, change_layout, network_file

__all__ = ["CONFIG", "arrange", "change_layout", "network_file"]
