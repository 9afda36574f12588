"""Read baked files back: describe, check, compare with the base, and restore the base.

Begin with `reopen`, which rebuilds the plan of an export from its headers. `verify` checks a file by that plan, and
`compare_base` compares it with its base; `restore` gives the base back from a residual; `inspect` reads headers alone.
"""
