"""What tests share: makers of inputs, oracles, a Hub on this machine, processes."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SUPPORT = Path(__file__).resolve().parent
