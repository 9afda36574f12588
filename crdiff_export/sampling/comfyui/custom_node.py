"""The `__init__.py` of the folder of custom nodes, which takes the nodes from the package that `crdiff.json` names.

It runs in ComfyUI's Python, so it avoids new syntax. Only `crdiff_export` becomes importable, not its neighbours.
"""

import importlib.util
import json
import sys
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036  ComfyUI's Python may be older than ours
    raise ImportError(f"crdiff needs Python 3.11 or newer, this ComfyUI runs on {sys.version.split()[0]}")


def _load() -> None:
    here = Path(__file__).resolve().parent
    package = here / json.loads((here / "crdiff.json").read_text(encoding="utf-8"))["package"]
    spec = importlib.util.spec_from_file_location(
        "crdiff_export", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    if not (package / "__init__.py").exists() or spec is None or spec.loader is None:
        raise ImportError(f"{package} is not there any more; run `crdiff comfyui install` again")
    module = importlib.util.module_from_spec(spec)
    sys.modules["crdiff_export"] = module
    spec.loader.exec_module(module)


_load()

from crdiff_export.sampling.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS  # noqa: E402

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
