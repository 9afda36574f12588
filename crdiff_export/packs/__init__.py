"""Packs: what turns one base into its pruned models of several sizes, in one small file without weights.

`pack` is the value and how it is read, `write` the file, `create` makes packs of bases, `use` exports from them, and
`check` verifies them.
"""

from crdiff_export.packs.pack import (
    SUFFIX,
    BaseFile,
    Pack,
    PackHeader,
    find_pack,
    is_pack,
    open_pack,
    open_source,
    read_header,
)

__all__ = [
    "SUFFIX", "BaseFile", "Pack", "PackHeader", "find_pack", "is_pack", "open_pack", "open_source", "read_header",
]  # fmt: skip
