"""`python -m crdiff_export`, the same as `crdiff`."""

from crdiff_export.commands import main

main()
