"""Write the example workflow for ComfyUI: `python tools/comfyui_workflow.py [FOLDER]`.

One description gives the workflow as JSON, a drawing of it as PNG with the chunks `workflow` and `prompt` that ComfyUI
reads from a dropped picture, and a thumbnail as JPEG for its list of templates. Without FOLDER they replace those of
the package.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from example_workflow import drawing, two_sizes
from PIL import Image, PngImagePlugin

FOLDER = Path(__file__).parents[1] / "crdiff_export" / "sampling" / "comfyui" / "example_workflows"
# Enough for a flat drawing, in a third of the bytes.
_COLORS = 256


def write(folder: Path) -> list[Path]:
    """Write the three files.

    Args:
        folder: Where to; made if it is not there.

    Returns:
        The files.

    """
    graph = two_sizes.two_sizes()
    folder.mkdir(parents=True, exist_ok=True)
    page, picture, small = (folder / f"{two_sizes.NAME}{suffix}" for suffix in (".json", ".png", ".jpg"))
    page.write_text(json.dumps(graph.workflow(), indent=2) + "\n", encoding="utf-8", newline="\n")
    chunks = PngImagePlugin.PngInfo()
    for name, content in (("prompt", graph.prompt()), ("workflow", graph.workflow())):
        chunks.add_text(name, _compact(content))
    drawn = drawing.draw(graph).quantize(_COLORS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    drawn.save(picture, pnginfo=chunks, optimize=True)
    drawing.thumbnail({"portrait": two_sizes.PORTRAIT, "landscape": two_sizes.LANDSCAPE}).save(small, quality=88)
    return [page, picture, small]


def _compact(content: dict[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":"))


def main() -> int:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, metavar="FOLDER")
    for path in write(parser.parse_args().folder):
        sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
