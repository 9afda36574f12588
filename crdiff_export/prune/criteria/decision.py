"""What a criterion decides for one plan: a threshold for each scope, or a mask for each target."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from crdiff_export.prune.threshold import Threshold

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Mask:
    """Which weights of one target go: bit i (numpy.packbits, bitorder="little") is its element i in row-major order.

    `count` is the number of elements; what is left of the last byte is 0.
    """

    bits: "NDArray[np.uint8]"
    count: int

    @classmethod
    def pack(cls, pruned: "NDArray[np.bool_]") -> Self:
        """The mask of an array of any shape that is True where a weight goes."""
        import numpy as np

        return cls(np.packbits(pruned, bitorder="little"), pruned.size)

    def unpack(self, start: int = 0, stop: int | None = None) -> "NDArray[np.bool_]":
        """A flat array that is True where a weight goes, of all elements or of `start:stop`."""
        import numpy as np

        stop = self.count if stop is None else stop
        first = start // 8
        found = np.unpackbits(self.bits[first : -(-stop // 8)], bitorder="little")
        return found[start - 8 * first : stop - 8 * first].view(np.bool_)

    @property
    def pruned(self) -> int:
        """How many weights go."""
        import numpy as np

        return int(np.count_nonzero(self.unpack()))


@dataclass(frozen=True, slots=True)
class Decision:
    """What a criterion has decided for one plan, exactly.

    `thresholds`: one for each scope, in the plan's order; `bits` is None in those of scopes that masks decide. `masks`:
    one for each target, in the plan's order, None for targets of a scope of rank 0; None altogether where thresholds
    decide. `moved`: by index of the target all of its weights after compensation, as a flat array of raw bits in the
    output dtype (uint8, uint16 or uint32); those that go are +0.0, and no others are zero. `notes`: what a user should
    know of how these layers were ranked.
    """

    thresholds: tuple[Threshold, ...]
    masks: tuple[Mask | None, ...] | None = None
    moved: "Mapping[int, NDArray[Any]]" = field(default_factory=dict)
    notes: tuple[str, ...] = ()
