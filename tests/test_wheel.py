"""What an installation from the wheel has: all of the package, the recipes and the documentation."""

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.support import ROOT


def test_a_wheel_holds_every_file(tmp_path: Path) -> None:
    """A file that .gitignore names is left out, whether git knows it or not."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("crdiff_export/")}
    package = (
        path for path in (ROOT / "crdiff_export").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )
    files = {path.relative_to(ROOT).as_posix() for path in package}
    docs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*") if path.is_file()}
    beside = {*docs, *(f"recipes/{path.name}" for path in (ROOT / "recipes").iterdir())}
    assert held == files | {f"crdiff_export/{name}" for name in beside}
