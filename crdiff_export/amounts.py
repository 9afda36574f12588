"""Bytes as people read them."""

_STEPS = (("GB", 10**9), ("MB", 10**6), ("KB", 10**3))


def amount(size: float) -> str:
    """A number of bytes in the unit that suits it, in thousands as disks and the Hub count them."""
    for unit, step in _STEPS:
        if size >= step:
            return f"{size / step:.2f} {unit}"
    return f"{size:.0f} bytes"
