"""The decision of a criterion for one plan: a threshold for each scope, or a mask for each target."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from crdiff_export.prune.threshold import Threshold

if TYPE_CHECKING:
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Mask:
    """The pruned weights of one target: bit i (numpy.packbits, bitorder="little") is element i in row-major order.

    `count` is the number of elements; unused bits of the last byte are 0.
    """

    bits: "NDArray[np.uint8]"
    count: int

    @classmethod
    def pack(cls, pruned: "NDArray[np.bool_]") -> "Self":
        """Pack a bool array of any shape that is True for pruned weights."""
        import numpy as np

        return cls(np.packbits(pruned, bitorder="little"), pruned.size)

    def unpack(self, start: int = 0, stop: int | None = None) -> "NDArray[np.bool_]":
        """Unpack a range of elements.

        Args:
            start: The first element.
            stop: The end of the range; by default all elements.

        Returns:
            bool [stop - start], True for pruned weights.
        """
        import numpy as np

        stop = self.count if stop is None else stop
        first = start // 8
        flags = np.unpackbits(self.bits[first : -(-stop // 8)], bitorder="little")
        return flags[start - 8 * first : stop - 8 * first].view(np.bool_)

    @property
    def pruned(self) -> int:
        """The number of pruned weights."""
        import numpy as np

        return int(np.count_nonzero(self.unpack()))


@dataclass(frozen=True, slots=True)
class Decision:
    """The exact decision of a criterion for one plan.

    Attributes:
        thresholds: One for each scope, in the plan's order; `value` is None in all of them if masks decide.
        masks: One for each target, in the plan's order, None for targets of a scope of rank 0; None altogether if
            thresholds decide.
        moved: By index of the target, all of its weights after compensation: a flat array of raw bits in the output
            dtype (uint8, uint16 or uint32), in which pruned weights are +0.0 and no others are zero.
        notes: What a user should know about the ranking of these layers.
    """

    thresholds: tuple[Threshold, ...]
    masks: tuple[Mask | None, ...] | None = None
    moved: "Mapping[int, NDArray[Any]]" = field(default_factory=dict)
    notes: tuple[str, ...] = ()
