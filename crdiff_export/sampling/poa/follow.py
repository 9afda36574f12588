"""A model that follows the size of its pictures: what is pruned, and the weight of POA, are those of a pack's size.

Where the pruned model alone is asked for (weight 1), the weights are pruned in place, once for each change of size.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from crdiff_export.errors import PoaError
from crdiff_export.packs import Pack
from crdiff_export.sampling.poa import hooks, layers, packed
from crdiff_export.sampling.poa.checkpoint_tensors import prunes_nothing
from crdiff_export.sampling.poa.handle import ModelHandle
from crdiff_export.sampling.poa.hooks import NAME, LayerHook
from crdiff_export.sampling.poa.in_place import InPlace
from crdiff_export.sampling.poa.masks import LayerLimit, Part, ThresholdPart
from crdiff_export.sampling.poa.mix import Schedule, Weight
from crdiff_export.sampling.poa.picture_size import Cells, cells_of, picture_size
from crdiff_export.sampling.poa.source import Source
from crdiff_export.sizes import Size


class PackPoa(ModelHandle):
    """POA on one model, with the masks and the weight of the size that is drawn.

    Attributes:
        pack: The pack.
        size: The pack's size that is taken now; None for the dense model.
    """

    def __init__(
        self, pipe: Any, pack: Pack, weight: Weight | None, start: float, stop: float, mode: str, *,
        size: Size | None, check: bool, keep: bool,
    ) -> None:  # fmt: skip
        self.pack, self._fixed = pack, size
        self.size: Size | None = None
        self._is_installed = False
        self._is_settled = True  # False from the moment a change of size begins until it is complete
        super().__init__(pipe, pack.family.time, Schedule(1.0), mode, keep=keep)
        self._weight_given, self._span = weight, (start, stop)
        self._schedule_for(next(iter(pack.variants)))  # raises where the weight is none
        if not any(group.pruned for stamp in pack.variants.values() for group in stamp.groups.values()):
            raise prunes_nothing(pack.path)
        self._layers = packed.find_layers(self.model, pack)
        self._counts = {name: layer.weight.numel() for name, layer in self._layers.items()}
        if check:
            packed.check_base(self._layers, pack)
        self._in_place = InPlace(self._layers)
        self._limits = {name: LayerLimit(count) for name, count in self._counts.items()}
        self._seen: Cells | None = None
        self._noted: set[str] = set()
        if self._mixes:
            for path, layer in self._layers.items():
                hooks.refuse_wrapped(path, layer)

    @property
    def _mixes(self) -> bool:
        """Whether two predictions are mixed at any size of the pack."""
        sizes = [self._fixed] if self._fixed else self.pack.variants
        return any(self._schedule_for(size).constant not in (0, 1) for size in sizes)

    @property
    def schedule(self) -> Schedule:
        """The POA weight at each moment of sampling, for the size that is taken now."""
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        self._schedule = self.checked(schedule)
        self._weight_given, self._span = schedule.weight, (schedule.start, schedule.stop)
        size, self._seen = self._fixed or self.size, None
        if self._is_installed:
            self._attach()
            self._take(None)
            self._take(size)

    def _schedule_for(self, size: Size) -> Schedule:
        weight = self._weight_given
        if weight is None:
            weight = self.pack.variants[size].poa_weight
        return Schedule(weight, *self._span)

    def install(self) -> None:
        """Put the hooks on the model and, where two predictions are mixed, on its layers."""
        self._attach()
        super().install()
        self._is_installed = True
        if self._fixed:
            self._take(self._fixed)

    def _attach(self) -> None:
        if self._mixes and not self._hooks:
            self._hooks = {name: hooks.attach(layer, self._switch, None) for name, layer in self._layers.items()}

    @property
    def changes_weights(self) -> bool:
        """Whether the weights of the model are pruned ones now."""
        return self._in_place.is_pruned

    @property
    def extra_bytes(self) -> int:
        """Bytes in memory beside the model's own weights: what is pruned in place, and as `Poa` has them."""
        return self._in_place.extra_bytes + super().extra_bytes

    def remove(self) -> None:
        """Make the model dense again and take all hooks off; PoaError, with nothing changed, if it cannot be."""
        self._in_place.restore()
        self._is_installed, self.size, self._seen = False, None, None
        super().remove()
        for name, hook in self._hooks.items():
            hooks.detach(self._layers[name], hook)

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._refuse_changes()  # before the weights are changed
        if not self._fixed:
            self._follow(args, kwargs)
        return super()._before(model, args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it has no types
    def _follow(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Take the size of the picture that the model is called for."""
        cells = cells_of(args, kwargs)
        if cells == self._seen and cells is not None and self._is_settled:
            return
        if cells is None:
            raise PoaError(
                "nothing tells the size of the picture that is drawn",
                f'Name one: poa.enable(pipe, "{self.pack.path}", size="{next(iter(self.pack.variants))}").',
            )
        chosen = packed.choose(self.pack, picture_size(cells, self.pack.family, self._pipe()))
        self._take(chosen.size)
        self._seen = cells
        if chosen.note and chosen.note not in self._noted:
            self._noted.add(chosen.note)
            warnings.warn(chosen.note, stacklevel=1)  # the callers are those of torch

    def _take(self, size: Size | None) -> None:
        """Prune as a size of the pack does, from now on; None makes the model dense."""
        if size == self.size and self._is_settled:
            return
        parts = packed.parts(self.pack, size, self._counts) if size else {}
        schedule = self._schedule_for(size) if size else self._schedule
        self._is_settled = False
        self._in_place.restore()
        self.size = None
        if size and schedule.constant == 1:
            self._in_place.prune(parts)
        for name, hook in self._hooks.items():
            self._set_part(name, hook, parts.get(name))
        self.size, self._schedule, self._is_settled = size, schedule, True

    def _set_part(self, name: str, hook: LayerHook, part: Part | None) -> None:
        """Let a layer's hook prune as a part does; a threshold is set in what a compiled graph reads already."""
        limit = self._limits[name]
        if part is None or isinstance(part, ThresholdPart):
            limit.set(part)
            if hook.part is limit:
                hook.forget()
                return
            hook.follow(self._switch, limit, self._layers[name].weight.dtype)
        else:
            hook.follow(self._switch, part, self._layers[name].weight.dtype)

    def _weight(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        """Return the weight of this call; where the model is pruned in place or dense, it makes one pass of its own."""
        if self.size is None or self._in_place.is_pruned:
            return 0.0
        return super()._weight(args, kwargs)


class PrunedModel(ModelHandle):
    """A model that is pruned in place with the masks of one source, until its handle is removed."""

    def __init__(self, pipe: Any, source: Source, *, check: bool) -> None:
        super().__init__(pipe, source.plan.match.family.time, Schedule(1.0), "sequential")
        self.source = source
        self._layers = layers.find(self.model, source)
        # A model that held the pruned weights already holds them in the end, too.
        self.filled = (check or source.has_residual) and layers.make_dense(self._layers, source, check=check)
        self._in_place = InPlace(self._layers)

    @property
    def schedule(self) -> Schedule:
        """The weight, which is 1 at every step."""
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        raise PoaError(
            f"{schedule!r}: a model that poa.prune has pruned is the pruned one", "Take poa.enable for that."
        )

    @property
    def changes_weights(self) -> bool:
        """Whether the weights of the model are pruned ones now."""
        return self._in_place.is_pruned

    @property
    def extra_bytes(self) -> int:
        """Bytes in memory beside the model's own weights: the values that became zero, and a bit for each weight."""
        return self._in_place.extra_bytes

    def install(self) -> None:
        """Prune the weights."""
        self._in_place.prune({name: parts[0] for name, parts in self.source.masks.diffusers.items()})
        self.source.masks.release()
        setattr(self.model, NAME, self)

    def remove(self) -> None:
        """Make the model dense again, bit by bit; PoaError, with nothing changed, if that is not possible."""
        if not self.filled:
            self._in_place.restore()
        delattr(self.model, NAME)
