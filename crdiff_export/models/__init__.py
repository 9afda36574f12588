"""What is known about models: families, recipes and the built-in demo models.

This exports the records of recipes; `recipe_files` loads them, `recipe_toml` reads and writes their text. `families`
and `demo` are packages of their own, which are imported when they are needed.
"""

from crdiff_export.models.recipe import MAX_POA_WEIGHT, TARGETS, Evidence, Recipe, Variant, check_groups, choose

__all__ = ["MAX_POA_WEIGHT", "TARGETS", "Evidence", "Recipe", "Variant", "check_groups", "choose"]
