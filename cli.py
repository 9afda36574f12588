"""Run crdiff from a checkout: `python cli.py export ...`."""

from crdiff_export.cli import main

main()
