"""Load a folder of custom nodes without ComfyUI."""

import subprocess
import sys
from pathlib import Path


def load(node: Path) -> subprocess.CompletedProcess[str]:
    """Load the folder as ComfyUI does, in a Python that has nothing installed."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('nodes', {str(node / '__init__.py')!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "import crdiff_export\n"
        "print(*module.NODE_CLASS_MAPPINGS, *module.NODE_DISPLAY_NAME_MAPPINGS.values(), sep='|')\n"
        "print(crdiff_export.__file__)\n"
    )
    return subprocess.run([sys.executable, "-I", "-S", "-c", code], check=False, capture_output=True, text=True)
