"""Read baked files back: describe, check, compare with the base, and restore the base.

Begin with `reopen`, which rebuilds the plan of an export from its headers. `verify` checks a file by that plan, and
`compare_base` compares it with its base; `restore` gives the base back from a residual; `inspect` reads headers alone.
`layers` counts the zeros of any checkpoint, `diff` compares any two.
Other rooms import the functions `inspect`, `restore` and `verify` from the modules of these names.
"""

from crdiff_export.verify.reopen import DATA_HASH, FILE_HASH, BakedCheckpoint, open_baked, read_decision
from crdiff_export.verify.residual_reader import check_residuals, check_sidecars, dense_weights, find_residuals

__all__ = [
    "DATA_HASH", "FILE_HASH", "BakedCheckpoint", "check_residuals", "check_sidecars", "dense_weights", "find_residuals",
    "open_baked", "read_decision",
]  # fmt: skip
