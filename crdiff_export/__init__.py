"""Prune diffusion checkpoints for sizes they were not trained for, and write them for any loader (arXiv 2604.05524)."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from crdiff_export.errors import CrdiffError
    from crdiff_export.export import Baked, ExportRequest, export
    from crdiff_export.sampling import poa
    from crdiff_export.sizes import Size

__all__ = ["Baked", "CrdiffError", "ExportRequest", "Size", "export", "poa"]

# Where each public name lives. It is imported when it is first used (PEP 562), so that `--help` loads none of it.
_HOMES: Final = {
    "Baked": "crdiff_export.export",
    "CrdiffError": "crdiff_export.errors",
    "ExportRequest": "crdiff_export.export",
    "Size": "crdiff_export.sizes",
    "export": "crdiff_export.export",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used.

    Raises:
        AttributeError: The package has no such public name.

    """
    if name == "poa":
        return import_module("crdiff_export.sampling.poa")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


class _Package(ModuleType):
    """Keeps the function `export` in front of the module of the same name, which Python binds here when it loads it."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value.export if name == "export" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package
