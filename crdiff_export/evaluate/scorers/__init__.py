"""What says how good a picture is: one module for each scorer, and none is imported before it is needed.

Begin with `score.py`, the protocol, and `spec.py`, which turns what a user writes for `--scorer` into a scorer.
"""

from crdiff_export.evaluate.scorers.score import Score, Scorer
from crdiff_export.evaluate.scorers.spec import check_prompts, choose, load, names, public

__all__ = ["Score", "Scorer", "check_prompts", "choose", "load", "names", "public"]
