"""Which weights are set to zero: plan, thresholds, criteria and the kernels that count and clear.

Begin with `plan_request.plan_variant`: it makes the `Plan` from headers and the recipe. `rank` reads the weights of a
plan, and the `Decision` that follows has a threshold for each scope or a mask for each target.
Importing this loads neither torch nor NumPy.
"""

from crdiff_export.prune.architecture import Architecture
from crdiff_export.prune.criteria import Decision, Mask, Ranked
from crdiff_export.prune.criterion_choice import MAGNITUDE, UNIFORM, CriterionChoice
from crdiff_export.prune.kernels import Kernel
from crdiff_export.prune.plan import OutputFile, Plan, Run, Scope, Target, TooWideError, recognise, with_ratios
from crdiff_export.prune.plan_request import PlanRequest, plan_variant
from crdiff_export.prune.ranking import rank
from crdiff_export.prune.threshold import Threshold

__all__ = [
    "MAGNITUDE",
    "UNIFORM",
    "Architecture",
    "CriterionChoice",
    "Decision",
    "Kernel",
    "Mask",
    "OutputFile",
    "Plan",
    "PlanRequest",
    "Ranked",
    "Run",
    "Scope",
    "Target",
    "Threshold",
    "TooWideError",
    "plan_variant",
    "rank",
    "recognise",
    "with_ratios",
]
