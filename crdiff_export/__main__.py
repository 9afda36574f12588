"""`python -m crdiff_export`, the same as `crdiff`."""

from crdiff_export.cli import main

main()
