"""Prune diffusion checkpoints for sizes they were not trained for, and write them for any loader (arXiv 2604.05524)."""

from crdiff_export import poa
from crdiff_export.errors import CrdiffError
from crdiff_export.export import Baked, ExportRequest, export
from crdiff_export.recipe import Size

__all__ = ["Baked", "CrdiffError", "ExportRequest", "Size", "export", "poa"]
