"""Whether pruning does a model any good: dense, pruned and POA from the same noise, looked at or scored.

Begin with `run.py`, the story of `crdiff evaluate`; `preview/run.py` is that of `crdiff preview`. Scorers are in
`scorers/`, HTML pages, contact sheets and plots in `report/`. Importing this loads no torch, diffusers or Pillow.
"""

from crdiff_export.evaluate.files import write
from crdiff_export.evaluate.render import draw
from crdiff_export.evaluate.request import EvaluateJob, EvaluateRequest, Subject
from crdiff_export.evaluate.results import Evaluation, Finding
from crdiff_export.evaluate.run import evaluate, measure, prepare
from crdiff_export.evaluate.scorers import Scorer

__all__ = [
    "EvaluateJob",
    "EvaluateRequest",
    "Evaluation",
    "Finding",
    "Scorer",
    "Subject",
    "draw",
    "evaluate",
    "measure",
    "prepare",
    "write",
]
