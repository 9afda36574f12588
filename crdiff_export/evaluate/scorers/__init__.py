"""What says how good a picture is: one module for each scorer; none is imported before it is asked for."""

from crdiff_export.evaluate.scorers.score import Score, Scorer
from crdiff_export.evaluate.scorers.spec import check, load, names, parse, public

__all__ = ["Score", "Scorer", "check", "load", "names", "parse", "public"]
