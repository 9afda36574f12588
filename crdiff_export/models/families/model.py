"""Records that describe a model family; `unet.py` and `table.py` fill them, `detect.py` reads them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

# `ff-shared` is a feed-forward that the text goes through, too.
Kind = Literal["attn", "ff", "attn2", "ff-shared"]
# A width that is not a fixed one.
ANY: Final = -1
# diffusers converts a UNet in the original layout only with this prefix; ComfyUI recognises a checkpoint by it.
BUNDLED: Final = "model.diffusion_model."
LayoutName = Literal["original", "diffusers"]
Time = Literal["timestep", "fraction", "rising", "edm"]


@dataclass(frozen=True, slots=True)
class RowBlocks:
    """Part of a fused tensor: `count` blocks of rows from block `first` on.

    The rows are `of` equal blocks. Without `of`, a block is a square: D rows of a tensor of shape `[n*D, D]`.
    """

    first: int
    count: int = 1
    of: int | None = None

    @property
    def stop(self) -> int:
        """The block after the last one."""
        return self.first + self.count

    def rows(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return the first row, and the row after the last one, in a tensor of this shape."""
        rows, columns = shape
        height = columns if self.of is None else rows // self.of
        return self.first * height, self.stop * height


@dataclass(frozen=True, slots=True)
class FamilyLayer:
    """One weight that may be pruned: a whole tensor, or a part of a fused one (qkv, linear1).

    Attributes:
        tensor: The name of its tensor in the layout, without prefix.
        part: Its part of that tensor; None for a whole tensor.
        group: The group of its block.
        kind: What it is, for `--targets`.
        original: The name of its tensor in the original layout, and its part of it.
        diffusers: The name of its tensor in diffusers, which has no fused tensors.
    """

    tensor: str
    part: RowBlocks | None
    group: str
    kind: Kind
    original: tuple[str, RowBlocks | None]
    diffusers: str

    def rows(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return its first row, and the row after its last one, in its tensor of this shape."""
        return self.part.rows(shape) if self.part else (0, shape[0])

    def original_start(self, count: int) -> int:
        """Return how many elements of its original tensor are before it, if `count` are its own."""
        part = self.original[1]
        return part.first * count // part.count if part else 0


class BlockWeight(NamedTuple):
    """One weight of a block of a UNet that may be pruned: its name inside the block, in both layouts, and its kind."""

    name: str
    kind: Kind


class Block(NamedTuple):
    """One block of a network: its group, its path in both layouts, and its weights that may be pruned."""

    group: str
    original: str
    diffusers: str
    weights: tuple[BlockWeight, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """A tensor that distinguishes families with the same layers, by its size along `axis` or by its presence.

    Without `sizes` only the presence counts. `what` names the size in messages.
    """

    tensor: str
    axis: int = 0
    sizes: tuple[int, ...] = ()
    present: bool = True
    what: str = "size"


@dataclass(frozen=True, slots=True)
class Layout:
    """One layout of a family.

    Attributes:
        name: Its name.
        layers: The layers that may be pruned.
        marks: The marks of the family.
        first: The tensor whose axis 1 are the in-channels.
        last: The tensor whose axis 0 are the out-channels, if they tell models of the family apart.
        others: How the names of layers begin that look like targets and are none.
        vectors: The tensors that may embed a vector beside the text, which has the width of axis 1.
    """

    name: LayoutName
    layers: tuple[FamilyLayer, ...]
    marks: tuple[Mark, ...] = ()
    first: str = ""
    vectors: tuple[str, ...] = ()
    last: str = ""
    others: tuple[str, ...] = ()


def layout_of(
    name: LayoutName,
    blocks: Sequence[Block],
    marks: tuple[Mark, ...],
    first: str,
    vectors: tuple[str, ...] = (),
    last: str = "",
) -> Layout:
    """Describe one layout of a network by its blocks; all layouts list the same layers in the same order."""
    layers = []
    for block in blocks:
        for weight in block.weights:
            original, diffusers = f"{block.original}.{weight.name}", f"{block.diffusers}.{weight.name}"
            tensor = original if name == "original" else diffusers
            layers.append(FamilyLayer(tensor, None, block.group, weight.kind, (original, None), diffusers))
    return Layout(name, tuple(layers), marks, first, vectors, last)


@dataclass(frozen=True, slots=True)
class Special:
    """A model with the layers of a family that takes something else in, which its channels or other layers tell.

    Attributes:
        id: The short name, which is also in the header.
        title: What people read behind the family's title.
        architecture: The ModelSpec id.
        channels: Its in-channels; None if they are the family's.
        vector: The width of the vector beside its text, or ANY; None if it is the family's.
        tensors: Tensors that only this model has, one for each layout that it is saved in.
        prompt: Whether a prompt alone is enough for it, in a pipeline of its own.
    """

    id: str
    title: str
    architecture: str
    channels: int | None = None
    vector: int | None = None
    tensors: tuple[str, ...] = ()
    prompt: bool = False


@dataclass(frozen=True, slots=True)
class Twin:
    """Another model with the names and shapes of a family, distinguished by its weights: see `prune/architecture.py`.

    In the twin the standard deviation of one tensor, named for each layout in `tensors`, is at most `limit`.
    """

    architecture: str
    native: tuple[int, int]
    tensors: Mapping[str, str]
    limit: float


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The names that diffusers uses for a model.

    Attributes:
        pipeline: The pipeline class.
        config: A Hub repository with the configuration and the components that are not pruned, or the name of the
            built-in base.
        network: The class of the pruned component.
        folder: The folder of the pruned component.
        dtype: The torch dtype of a code snippet.
        call: Arguments of the pipeline's call, formatted with a Size.
        pictures: Names of input pictures that the call needs.
        prediction: What the scheduler of `config` predicts.
        steps: The usual steps of sampling; None takes ours.
        guidance: The usual guidance; None takes that of diffusers.
        guidance_argument: The argument of the call that takes the guidance.
        negative_prompt: The negative prompt where the user gives none.
        arguments: Further arguments of the call.
        batch: How many pictures to draw at once; None leaves it to the device.
        threads: How many threads to draw one picture with; None takes torch's number.
    """

    pipeline: str
    config: str
    network: str = "UNet2DConditionModel"
    folder: str = "unet"
    dtype: str = "float16"
    call: str = "width={0.width}, height={0.height}"
    pictures: tuple[str, ...] = ()
    prediction: str = "epsilon"
    steps: int | None = None
    guidance: float | None = None
    guidance_argument: str = "guidance_scale"
    negative_prompt: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    batch: int | None = None
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A text encoder of a family: its folder in diffusers, and its prefix and kind of names in the original layout."""

    folder: str
    prefix: str
    names: Literal["clip", "open-clip"]


@dataclass(frozen=True, slots=True)
class Family:
    """Everything that is known about one model family.

    Attributes:
        id: The short name, which is also the alias of its recipe.
        title: The name for people.
        architecture: The ModelSpec id; empty if the family has none.
        implementation: The ModelSpec implementation.
        native: Width and height in pixels that the model was trained at; None where only the model itself can say it.
        grid: Image sides are multiples of this number of pixels.
        cell: Pixels for each number of a latent, in both directions.
        groups: The groups of blocks with a ratio of their own.
        scope: Whether a threshold is computed for a group or for each layer.
        kinds: The kinds of layers that may be pruned.
        default_kinds: The kinds that are pruned by default.
        layouts: The ways in which the model is saved.
        channels: The in-channels of its text-to-image model.
        vector: The width of the vector that it takes beside the text; None if it takes none.
        specials: Models with the same layers that need something else than a prompt, or another pipeline.
        twin: Another model with the same names and shapes.
        buckets: Whether it was trained on pictures of many shapes with about the native area.
        pipelines: The diffusers pipeline of the plain model (''), of special ones by their id, of the twin (`base`),
            and of a model that predicts as EDM does (`edm`).
        time: What diffusers' pipelines give as its timestep: the scheduler's `timestep`, that as a `fraction` of the
            training's steps, 1 minus that fraction (`rising`), or sigma / (sigma + 1) (`edm`).
        negative: Whether its pipeline takes a negative prompt.
        sample_size: Whether `sample_size` of its configuration is the size that it was trained at.
        programs: The programs beside diffusers that open it: `comfyui`, or `comfyui-original` if only in the original
            layout, `a1111`, `forge`.
        table: The text of its table, for a family that is not built in; a baked file carries it.
        text_encoders: Its text encoders; a file in the original layout has them beside the network.
        config: What shapes do not tell of its `config.json` in diffusers, such as the number of heads; None if that is
            not known.
    """

    id: str
    title: str
    architecture: str
    implementation: str
    native: tuple[int, int] | None
    grid: int
    groups: tuple[str, ...]
    scope: Literal["group", "layer"]
    kinds: tuple[Kind, ...]
    default_kinds: tuple[Kind, ...]
    layouts: tuple[Layout, ...]
    channels: int = 4
    vector: int | None = None
    specials: tuple[Special, ...] = ()
    twin: Twin | None = None
    buckets: bool = False
    pipelines: Mapping[str, Pipeline] = field(default_factory=dict)
    time: Time = "timestep"
    cell: int = 8
    negative: bool = True
    sample_size: bool = True
    programs: tuple[str, ...] = ("comfyui",)
    table: str = ""
    text_encoders: tuple[TextEncoder, ...] = ()
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Match:
    """A recognised checkpoint: its family, layout, prefix, what is special about it, and its EMA tensors."""

    family: Family
    layout: Layout
    prefix: str
    special: Special | None = None
    ema_tensors: int = 0

    @property
    def title(self) -> str:
        """The family's title, and what is special about the model."""
        return f"{self.family.title}, {self.special.title}" if self.special else self.family.title
