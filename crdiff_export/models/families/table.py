"""Read a family from its table in TOML: how it is recognised, what it is called, and which tensors are its targets.

docs/families.md teaches the format. A UNet is described by its geometry, from which all names follow; any other model
by a list of its targets, in which `{0..18}` stands for the numbers of its blocks.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, get_args

from crdiff_export.errors import FamilyError, RecipeError
from crdiff_export.formats import toml
from crdiff_export.formats.text_file import read_text_file
from crdiff_export.models.families.model import (
    ANY,
    Family,
    FamilyLayer,
    Kind,
    Layout,
    LayoutName,
    Mark,
    Pipeline,
    RowBlocks,
    Special,
    TextEncoder,
    Time,
    Twin,
)
from crdiff_export.models.families.unet import GROUPS, unet_layouts
from crdiff_export.models.recipe_toml import RecipeTable, shown
from crdiff_export.sizes import Size

LAYOUTS: Final[tuple[LayoutName, ...]] = ("original", "diffusers")
KINDS: Final[tuple[Kind, ...]] = ("attn", "ff", "attn2", "ff-shared")
# More blocks than any model has: a range in a foreign file must not fill the memory.
_MOST_BLOCKS = 1000
_MOST_LAYERS = 20_000
MAX_TABLE: Final = 1 << 18
# The header of a baked file has the table under this key.
TABLE_KEY: Final = "crdiff.family.table"
_RANGE = re.compile(r"\{(\d{1,4})\.\.(\d{1,4})\}")
_PROGRAMS = ("comfyui", "comfyui-original", "a1111", "forge")
_EXAMPLES: Final = {
    "id": 'id = "my-model"',
    "title": 'title = "My model"',
    "architecture": 'architecture = "my-model-v1", or leave it out',
    "implementation": 'implementation = "sgm"',
    "native": 'native = "1024x1024"',
    "grid": "grid = 16",
    "cell": "cell = 8",
    "buckets": "buckets = true",
    "unet": "[unet], with down, mid and context",
    "transformer": "[transformer], with kinds and default",
    "target": '[[target]], with kind = "ff" and the names in each layout',
    "special": '[[special]], with id = "inpainting" and channels = 9',
    "pipeline": '[pipeline], with class = "FluxPipeline"',
    "twin": "[twin]",
    "programs": 'programs = ["comfyui"]',
    "prompt": "prompt = true",
    "down": "down = [0, 2, 10]",
    "up": "up = [10, 2, 0]",
    "mid": "mid = 10",
    "layers": "layers = 2",
    "context": "context = 2048",
    "channels": "channels = 4",
    "time": 'time = "fraction"',
    "negative": "negative = false",
    "sample_size": "sample_size = false",
    "vector": "vector = 2816",
    "kinds": 'kinds = ["ff", "attn"]',
    "default": 'default = ["ff"]',
    "groups": 'groups = ["blocks"]',
    "kind": 'kind = "ff"',
    "group": 'group = "blocks"',
    "part": "part = 0, or [0, 1, 2] for three blocks of rows",
    "of": "of = 5, the number of equal blocks that the rows are",
    "original": 'original = "double_blocks.{0..18}.img_mlp.0.weight"',
    "diffusers": 'diffusers = "transformer_blocks.{0..18}.ff.net.0.proj.weight"',
    "first": 'first = "img_in.weight"',
    "last": 'last = "conv_out.weight"',
    "vectors": 'vectors = ["class_embedding.linear_1.weight"]',
    "others": 'others = ["context_refiner."]',
    "marks": 'marks = [{ tensor = "txt_in.weight", axis = 1, sizes = [4096], what = "width of the text" }]',
    "tensor": 'tensor = "txt_in.weight"',
    "tensors": 'tensors = ["siglip_embedder.0.weight"]',
    "axis": "axis = 1",
    "sizes": "sizes = [4096]",
    "what": 'what = "width of the text"',
    "absent": "absent = true",
    "class": 'class = "FluxPipeline"',
    "config": 'config = "ORG/NAME" in [pipeline], a table such as { attention_head_dim = 8 } in [unet]',
    "network": 'network = "FluxTransformer2DModel"',
    "call": 'call = "width={0.width}, height={0.height}"',
    "pictures": 'pictures = ["picture"]',
    "prediction": 'prediction = "v"',
    "steps": "steps = 4",
    "guidance": "guidance = 0.0",
    "guidance_argument": 'guidance_argument = "true_cfg_scale"',
    "negative_prompt": 'negative_prompt = " "',
    "arguments": "arguments = { use_resolution_binning = false }",
    "batch": "batch = 16",
    "threads": "threads = 1",
    "limit": "limit = 0.09",
    "text_encoder": '[[text_encoder]], with folder = "text_encoder", a prefix and names',
    "folder": 'folder = "text_encoder"',
    "prefix": 'prefix = "cond_stage_model.transformer."',
    "names": 'names = "clip", or "open-clip"',
}  # fmt: skip
_KEYS: Final = (
    "id", "title", "architecture", "implementation", "native", "grid", "cell", "buckets", "unet", "transformer",
    "target", "special", "pipeline", "twin", "programs", "text_encoder",
)  # fmt: skip


def load_family(path: Path) -> Family:
    """Read the file of a family that is not built in.

    Args:
        path: The file.

    Returns:
        The family, with the text of its table.

    Raises:
        FamilyError: The file cannot be read, or is no table of a family.
    """
    text = read_text_file(path, "family", "Name one TOML file; `crdiff families show sdxl` prints one.", FamilyError)
    return parse_family(text, path.name, foreign=True)


def parse_family(text: str, where: str, *, foreign: bool = False) -> Family:
    """Read a family.

    Args:
        text: The table, in TOML.
        where: The file, with which messages begin.
        foreign: Whether the family is not built in, so that files of it carry the table.

    Returns:
        The family.

    Raises:
        FamilyError: The text is no TOML, or a key is missing, unknown or wrong.
    """
    if len(text) > MAX_TABLE:
        raise FamilyError(f"{where}: has {len(text):,} characters, a family has at most {MAX_TABLE:,}", "Shorten it.")
    try:
        values = toml.parse(text)
    except (ValueError, RecursionError) as error:
        raise FamilyError(f"{where}: {error}", "A family is TOML; `crdiff families show sdxl` prints one.") from error
    try:
        family = _family(RecipeTable(values, where, examples=_EXAMPLES, document="family"))
    except RecipeError as error:
        raise FamilyError(error.message, error.hint) from error
    return replace(family, table=text) if foreign else family


def _title(table: RecipeTable) -> str:
    """Read a title, which is shown on terminals as it is."""
    title = table.string("title")
    if not title.isprintable():
        raise table.wrong("title", f"is {shown(title)}, must be one line without control characters")
    return title


def _family(table: RecipeTable) -> Family:
    table.refuse_unknown(_KEYS)
    name = table.string("id")
    if not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", name):
        raise table.wrong("id", f"is {shown(name)}, must be lower-case letters, digits, dots and dashes")
    if ("unet" in table) == ("transformer" in table):
        raise table.wrong("unet", "and transformer: there has to be one of the two")
    if "unet" in table and "target" not in table:
        network = _unet(table.table("unet"))
    else:
        network = _network(table, table.table("unet" if "unet" in table else "transformer"))
    native = table.size("native") if "native" in table else None
    return Family(
        id=name,
        title=_title(table),
        architecture=table.string("architecture") if "architecture" in table else "",
        implementation=table.string("implementation") if "implementation" in table else "sgm",
        native=(native.width, native.height) if isinstance(native, Size) else None,
        grid=table.count("grid") if "grid" in table else 8,
        cell=table.count("cell") if "cell" in table else 8,
        specials=tuple(_special(each) for each in _tables(table, "special")),
        twin=_twin(table.table("twin")) if "twin" in table else None,
        buckets=_flag(table, "buckets"),
        pipelines=_pipelines(table.table("pipeline"), unet="unet" in table) if "pipeline" in table else {},
        programs=_programs(table),
        text_encoders=tuple(_text_encoder(each) for each in _tables(table, "text_encoder")),
        **network,
    )


def _unet(table: RecipeTable) -> dict[str, Any]:
    table.refuse_unknown(("down", "mid", "up", "layers", "context", "channels", "vector", "config"))
    layers, mid = table.count("layers") if "layers" in table else 2, _whole(table, "mid")
    if layers >= _MOST_BLOCKS:
        raise table.wrong("layers", f"is {layers:,}, must be less than {_MOST_BLOCKS:,}")
    down = _depths(table, "down", layers)
    up = _depths(table, "up", layers + 1) if "up" in table else None
    layouts = unet_layouts(down, mid=mid, context=table.count("context"), layers=layers, up=up)
    present = {layer.group for layer in layouts[0].layers}
    return {
        "layouts": layouts, "scope": "group", "groups": tuple(group for group in GROUPS if group in present),
        "kinds": ("attn", "ff"), "default_kinds": ("attn", "ff"),
        "channels": table.count("channels") if "channels" in table else 4,
        "vector": table.count("vector") if "vector" in table else None,
        "config": _config(table),
    }  # fmt: skip


def _config(table: RecipeTable) -> Mapping[str, Any] | None:
    """Read what shapes do not tell of a network's configuration; None if the table does not say it."""
    if "config" not in table:
        return None
    values = table.table("config").values
    for key, value in values.items():
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(number, bool | int | float | str) for number in numbers):
            raise table.wrong("config", f"has {shown(key)}, which must be a text, a number, true, false, or a list")
    return values


def _text_encoder(table: RecipeTable) -> TextEncoder:
    table.refuse_unknown(("folder", "prefix", "names"))
    names = table.string("names")
    for kind in ("clip", "open-clip"):
        if names == kind:
            return TextEncoder(table.string("folder"), table.string("prefix"), kind)
    raise table.wrong("names", f"is {shown(names)}, must be clip or open-clip")


def _depths(table: RecipeTable, key: str, layers: int) -> tuple[int | tuple[int, ...], ...]:
    """Read the depth of each level: a number, or one for each of its attentions."""
    value: Any = table.values.get(key)
    depths: list[int | tuple[int, ...]] = []
    for level in value if isinstance(value, list) and value else [None]:
        numbers: list[Any] = level if isinstance(level, list) else [level] * layers
        if len(numbers) != layers or not all(type(n) is int and 0 <= n < _MOST_BLOCKS for n in numbers):
            problem = f"must be an array of levels, each a number of blocks, or {layers} of them"
            raise table.wrong(key, problem if key in table else "is missing")
        depths.append(tuple(numbers) if isinstance(level, list) else numbers[0])
    return tuple(depths)


def _network(document: RecipeTable, table: RecipeTable) -> dict[str, Any]:
    """Read a network with a list of its targets: [transformer], or [unet], whose groups have a threshold each."""
    keys = ("kinds", "default", "groups", "channels", "vector", "config")
    scope = "group" if "unet" in document else "layer"
    of_transformers = ("time", "negative", "sample_size") if scope == "layer" else ()
    table.refuse_unknown((*keys, *of_transformers, *LAYOUTS))
    kinds = table.strings("kinds")
    if unknown := next((kind for kind in kinds if kind not in KINDS), None):
        raise table.wrong("kinds", f"has {shown(unknown)}, must be some of {', '.join(KINDS)}")
    default = table.strings("default")
    if not set(default) <= set(kinds):
        raise table.wrong("default", f"must be some of {', '.join(kinds)}")
    groups = table.strings("groups") if "groups" in table or scope == "group" else ("blocks",)
    names = [name for name in LAYOUTS if name in table]
    if not names:
        raise table.wrong("diffusers", "is missing, as is original", f"Write [{table.path}diffusers], with first.")
    layers: dict[LayoutName, list[FamilyLayer]] = {name: [] for name in names}
    targets = _tables(document, "target")
    if not targets:
        raise document.wrong("target", "is missing")
    for target in targets:
        for layer in _target(target, groups, kinds, names):
            layers[layer[0]].append(layer[1])
        if len(layers[names[0]]) > _MOST_LAYERS:
            raise document.wrong("target", f"stands for more than {_MOST_LAYERS:,} tensors")
    for name in names:
        _refuse_overlaps(document, layers[name])
    if sorted(groups) != sorted({layer.group for layer in layers[names[0]]}):
        raise table.wrong("groups", "must have each group of the targets once, and no other")
    layouts = tuple(_layout(table.table(name), name, tuple(layers[name])) for name in names)
    return {
        "layouts": layouts, "scope": scope, "groups": groups, "kinds": kinds, "default_kinds": default,
        "channels": table.count("channels") if "channels" in table else 4,
        "vector": table.count("vector") if "vector" in table else None,
        "time": _time(table), "negative": _flag(table, "negative", usual=True),
        "sample_size": _flag(table, "sample_size", usual=True),
        "config": _config(table),
    }  # fmt: skip


def _refuse_overlaps(document: RecipeTable, layers: Sequence[FamilyLayer]) -> None:
    """Refuse two targets that share weights: they would be counted twice."""
    parts: dict[str, list[RowBlocks | None]] = {}
    for layer in layers:
        for other in parts.setdefault(layer.tensor, []):
            part = layer.part
            if not part or not other or part.of != other.of or (part.first < other.stop and other.first < part.stop):
                raise document.wrong("target", f"has weights of {shown(layer.tensor)} twice")
        parts[layer.tensor].append(layer.part)


def _target(
    table: RecipeTable, groups: tuple[str, ...], kinds: tuple[str, ...], names: list[LayoutName]
) -> Iterator[tuple[LayoutName, FamilyLayer]]:
    """Yield the layers of one [[target]], for each layout."""
    table.refuse_unknown(("kind", "group", "part", "of", *LAYOUTS))
    kind, group = table.string("kind"), table.string("group") if "group" in table or groups[1:] else groups[0]
    if kind not in kinds:
        raise table.wrong("kind", f"is {shown(kind)}, must be one of {', '.join(kinds)}")
    if group not in groups:
        raise table.wrong("group", f"is {shown(group)}, must be one of {', '.join(groups)}")
    part = _part(table, names)
    expanded = {name: _expand(table, name) for name in names}
    if len({len(tensors) for tensors in expanded.values()}) > 1:
        raise table.wrong(names[1], f"stands for {len(expanded[names[1]])} tensors, {names[0]} for another number")
    originals = expanded.get("original") or expanded["diffusers"]
    diffusers_names = expanded.get("diffusers") or expanded["original"]
    for original, diffusers in zip(originals, diffusers_names, strict=True):
        for name in names:
            tensor, of_tensor = (original, part) if name == "original" else (diffusers, None)
            yield name, FamilyLayer(tensor, of_tensor, group, kind, (original, part), diffusers)  # type: ignore[arg-type]


def _part(table: RecipeTable, names: list[LayoutName]) -> RowBlocks | None:
    """Read which part of a fused tensor of the original layout a target is; None for a whole tensor."""
    if "part" not in table:
        if "of" in table:
            raise table.wrong("part", "is missing, which `of` is for")
        return None
    if "original" not in names:
        raise table.wrong("part", "is for fused tensors, whose layout has to be called original")
    value: Any = table.values["part"]
    blocks: list[Any] = value if isinstance(value, list) else [value]
    if not blocks or not all(type(block) is int and 0 <= block < _MOST_BLOCKS for block in blocks):
        raise table.wrong("part", f"is {shown(value)}, must be the number of a block, or an array of them")
    if blocks != list(range(blocks[0], blocks[0] + len(blocks))):
        raise table.wrong("part", "must be blocks that follow each other")
    of = table.count("of") if "of" in table else None
    if of is not None and blocks[-1] >= of:
        raise table.wrong("of", f"is {of}, part has block {blocks[-1]}, and the first one is 0")
    return RowBlocks(blocks[0], len(blocks), of)


def _expand(table: RecipeTable, key: str) -> list[str]:
    """Return the names that a pattern with at most one range stands for."""
    pattern = table.string(key)
    ranges = list(_RANGE.finditer(pattern))
    if not pattern.endswith(".weight"):
        raise table.wrong(key, f"is {shown(pattern)}, must end in .weight")
    if len(ranges) > 1 or "{" in _RANGE.sub("", pattern):
        raise table.wrong(key, f"is {shown(pattern)}, must be a tensor's name with at most one range, {{0..18}}")
    if not ranges:
        return [pattern]
    first, last = int(ranges[0][1]), int(ranges[0][2])
    if not 0 <= last - first < _MOST_BLOCKS:
        raise table.wrong(key, f"has the range {first}..{last}, which stands for no block, or for too many")
    return [_RANGE.sub(str(number), pattern) for number in range(first, last + 1)]


def _layout(table: RecipeTable, name: LayoutName, layers: tuple[FamilyLayer, ...]) -> Layout:
    table.refuse_unknown(("first", "last", "vectors", "marks", "others"))
    marks = tuple(_mark(each) for each in _tables(table, "marks"))
    first, last = (table.string(key) if key in table else "" for key in ("first", "last"))
    vectors, others = (table.strings(key) if key in table else () for key in ("vectors", "others"))
    return Layout(name, layers, marks, first, vectors, last, others)


def _mark(table: RecipeTable) -> Mark:
    table.refuse_unknown(("tensor", "axis", "sizes", "what", "absent"))
    sizes = table.values.get("sizes", [])
    if not isinstance(sizes, list) or not all(type(size) is int and size > 0 for size in sizes):
        raise table.wrong("sizes", "must be an array of whole numbers")
    axis = _whole(table, "axis") if "axis" in table else 0
    what = table.string("what") if "what" in table else "size"
    return Mark(table.string("tensor"), axis, tuple(sizes), not _flag(table, "absent"), what)


def _special(table: RecipeTable) -> Special:
    table.refuse_unknown(("id", "title", "architecture", "channels", "vector", "tensors", "prompt"))
    vector = None
    if "vector" in table:
        vector = ANY if table.values["vector"] == "any" else table.count("vector")
    channels = table.count("channels") if "channels" in table else None
    tensors = table.strings("tensors") if "tensors" in table else ()
    if channels is None and vector is None and not tensors:
        raise table.wrong("channels", "is missing, and so are vector and tensors")
    texts = table.string("id"), _title(table), table.string("architecture")
    return Special(*texts, channels, vector, tensors, prompt=_flag(table, "prompt"))


def _twin(table: RecipeTable) -> Twin:
    table.refuse_unknown(("architecture", "native", "limit", *LAYOUTS))
    native = table.size("native")
    tensors: dict[str, str] = {name: table.string(name) for name in LAYOUTS}
    return Twin(table.string("architecture"), (native.width, native.height), tensors, table.number("limit"))


def _pipelines(table: RecipeTable, *, unet: bool) -> Mapping[str, Pipeline]:
    """Read the pipeline of the plain model, and those of special ones in tables of their ids."""
    settings = {key: value for key, value in table.values.items() if key == "arguments" or not isinstance(value, dict)}
    plain = RecipeTable(settings, table.where, table.path, table.examples, table.document)
    pipelines = {"": _pipeline(plain, unet=unet)} if settings else {}
    names = [key for key in table.values if key not in settings]
    return pipelines | {name: _pipeline(table.table(name), unet=unet) for name in names}


def _pipeline(table: RecipeTable, *, unet: bool) -> Pipeline:
    table.refuse_unknown((
        "class", "config", "network", "call", "pictures", "prediction", "steps", "guidance", "guidance_argument",
        "negative_prompt", "arguments", "batch", "threads",
    ))  # fmt: skip
    negative = table.values.get("negative_prompt")
    if not isinstance(negative, str | None):
        raise table.wrong("negative_prompt", f"is {shown(negative)}, must be a text")
    arguments = table.table("arguments").values if "arguments" in table else {}
    if wrong := next(
        (key for key, value in arguments.items() if not isinstance(value, bool | int | float | str)), None
    ):
        raise table.wrong("arguments", f"has {shown(wrong)}, which must be a text, a number, true or false")
    return Pipeline(
        pipeline=table.string("class"),
        config=table.string("config"),
        network=table.string("network") if "network" in table else "UNet2DConditionModel",
        folder="unet" if unet else "transformer",
        dtype="float16" if unet else "bfloat16",
        call=table.string("call") if "call" in table else "width={0.width}, height={0.height}",
        pictures=table.strings("pictures") if "pictures" in table else (),
        prediction=table.string("prediction") if "prediction" in table else "epsilon",
        steps=table.count("steps") if "steps" in table else None,
        guidance=table.number("guidance") if "guidance" in table else None,
        guidance_argument=table.string("guidance_argument") if "guidance_argument" in table else "guidance_scale",
        negative_prompt=negative,
        arguments=arguments,
        batch=table.count("batch") if "batch" in table else None,
        threads=table.count("threads") if "threads" in table else None,
    )


def _time(table: RecipeTable) -> Time:
    value = table.values.get("time", "timestep")
    times: tuple[Time, ...] = get_args(Time)
    if time := next((time for time in times if time == value), None):
        return time
    raise table.wrong("time", f"is {shown(value)}, must be one of {', '.join(times)}")


def _programs(table: RecipeTable) -> tuple[str, ...]:
    programs = table.values.get("programs", [_PROGRAMS[0]])
    if isinstance(programs, list) and all(program in _PROGRAMS for program in programs):
        return tuple(programs)
    raise table.wrong("programs", f"is {shown(programs)}, must be some of {', '.join(_PROGRAMS)}")


def _tables(table: RecipeTable, key: str) -> list[RecipeTable]:
    tables = enumerate(table.tables(key), 1)
    path = f"{table.path}{key}"
    return [RecipeTable(values, table.where, f"{path}[{n}].", table.examples, table.document) for n, values in tables]


def _whole(table: RecipeTable, key: str) -> int:
    value = table.values.get(key)
    if type(value) is int and 0 <= value < _MOST_BLOCKS:
        return value
    raise table.wrong(key, "is missing" if key not in table else f"is {shown(value)}, must be a whole number from 0")


def _flag(table: RecipeTable, key: str, *, usual: bool = False) -> bool:
    value = table.values.get(key, usual)
    if isinstance(value, bool):
        return value
    raise table.wrong(key, f"is {shown(value)}, must be true or false")
