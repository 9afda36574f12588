"""Pictures of a base, of its pruned model and of POA, side by side on one sheet.

Begin with `run.py`, the story of `crdiff preview`.
"""

from crdiff_export.evaluate.preview.files import write
from crdiff_export.evaluate.preview.render import draw
from crdiff_export.evaluate.preview.request import Preview, PreviewJob, PreviewRequest
from crdiff_export.evaluate.preview.run import measure, prepare, preview

__all__ = ["Preview", "PreviewJob", "PreviewRequest", "draw", "measure", "prepare", "preview", "write"]
