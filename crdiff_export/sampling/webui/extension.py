"""The script of the extension, which takes everything from the copy of the package beside it.

It runs in the UI's Python, so it avoids new syntax. Only `crdiff_export` becomes importable, not its neighbours.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from modules import scripts

if sys.version_info >= (3, 10):  # noqa: UP036  the UI's Python may be older than ours
    if "crdiff_export" not in sys.modules:
        _package = Path(__file__).resolve().parent.parent / "crdiff_export"
        _spec = importlib.util.spec_from_file_location(
            "crdiff_export", str(_package / "__init__.py"), submodule_search_locations=[str(_package)]
        )
        if _spec is not None and _spec.loader is not None:
            sys.modules["crdiff_export"] = importlib.util.module_from_spec(_spec)
            _spec.loader.exec_module(sys.modules["crdiff_export"])

    from crdiff_export.sampling.webui.script import script_class

    CrdiffScript = script_class()
else:

    class CrdiffScript(scripts.Script):  # type: ignore[misc,no-redef]
        """An accordion that says why it is empty."""

        def title(self) -> str:
            return "CR-Diff"

        def show(self, _is_img2img: bool) -> Any:
            return scripts.AlwaysVisible

        def ui(self, _is_img2img: bool) -> Any:
            import gradio as gr

            with gr.Accordion("CR-Diff", open=False):
                gr.Markdown("CR-Diff needs Python 3.10 or newer, this UI runs on " + sys.version.split()[0] + ".")
            return []
