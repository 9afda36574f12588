"""Families as tables: what a table says is what is recognised, and a wrong table is refused by its key."""

import random
import re
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest

from crdiff_export.errors import FamilyError
from crdiff_export.models.families import all_families, by_id, catalogue, detect, installed_families, load_family
from crdiff_export.models.families.catalogue import table_of
from crdiff_export.models.families.table import MAX_TABLE, parse_family
from tests.support import DOCS, geometry_tables
from tests.support.messages import raises

OWN = """
id = "own"
title = "My model"
native = "512x512"

[transformer]
kinds = ["ff", "attn"]
default = ["ff"]
channels = 16

[transformer.diffusers]
first = "img_in.weight"
marks = [{ tensor = "txt_in.weight", axis = 1, sizes = [24] }]

[[target]]
kind = "ff"
diffusers = "blocks.{0..2}.img_mlp.net.0.proj.weight"

[[target]]
kind = "attn"
diffusers = "blocks.{0..2}.attn.to_q.weight"
"""
# A UNet-like model, with a threshold for each group.
UNET = """
id = "own"
title = "My UNet"
native = "512x512"

[unet]
kinds = ["ff"]
default = ["ff"]
groups = ["encoder", "decoder"]
channels = 16
vector = 32

[unet.diffusers]
first = "img_in.weight"
last = "img_out.weight"
vectors = ["label.weight"]

[[target]]
kind = "ff"
group = "encoder"
diffusers = "down.{0..1}.mlp.weight"

[[target]]
kind = "ff"
group = "decoder"
diffusers = "up.{0..1}.mlp.weight"
"""
FUSED = (
    'id = "own"\ntitle = "My model"\n[transformer]\nkinds = ["ff"]\ndefault = ["ff"]\n[transformer.original]\n'
    '[[target]]\nkind = "ff"\noriginal = "blocks.{0..2}.mlp.0.weight"\npart = 0\nof = 3\n'
)
PIPELINE = '\n[pipeline]\nclass = "FluxPipeline"\nnetwork = "FluxTransformer2DModel"\nconfig = "a/b"\n'
SHAPES = {
    "img_in.weight": (8, 16), "txt_in.weight": (8, 24),
    **{f"blocks.{i}.{name}.weight": (8, 8) for i in range(3) for name in ("img_mlp.net.0.proj", "attn.to_q")},
}  # fmt: skip


def test_a_table_says_what_is_a_target() -> None:
    family = parse_family(OWN, "own.toml", foreign=True)
    match = detect(SHAPES, family)
    assert (match.family.id, match.layout.name, match.prefix, match.special) == ("own", "diffusers", "", None)
    layers = {layer.tensor: (layer.group, layer.kind, layer.part) for layer in match.layout.layers}
    assert layers == {
        **{f"blocks.{i}.img_mlp.net.0.proj.weight": ("blocks", "ff", None) for i in range(3)},
        **{f"blocks.{i}.attn.to_q.weight": ("blocks", "attn", None) for i in range(3)},
    }
    assert detect({f"transformer.{name}": shape for name, shape in SHAPES.items()}, family).prefix == "transformer."
    assert family.table == OWN


def test_targets_of_a_unet_may_be_listed() -> None:
    family = parse_family(UNET, "own.toml")
    assert (family.scope, family.groups) == ("group", ("encoder", "decoder"))
    shapes: dict[str, tuple[int, ...]] = {f"{half}.{i}.mlp.weight": (8, 8) for half in ("down", "up") for i in range(2)}
    shapes |= {"img_in.weight": (8, 16, 3, 3), "img_out.weight": (16, 8, 3, 3), "label.weight": (8, 32)}
    match = detect(shapes, family)
    assert [layer.group for layer in match.layout.layers] == ["encoder", "encoder", "decoder", "decoder"]
    assert match.special is None
    for tensor, shape, special in (
        ("img_in.weight", (8, 9, 3, 3), "9-channels"),
        ("img_out.weight", (8, 8, 3, 3), "8-outputs"),
        ("label.weight", (8, 64), "vector-64"),
        ("label.weight", None, "no-vector"),
    ):
        changed = {name: found for name, found in (shapes | {tensor: shape}).items() if found}
        odd = detect(changed, family).special
        assert odd is not None
        assert odd.id == special


@pytest.mark.parametrize("path", ["blocks", "layers", "h", "transformer.layers", "double_blocks"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_blocks_may_be_called_anything(path: str, prefix: str) -> None:
    family = parse_family(OWN.replace("blocks.{", f"{path}.{{"), "own.toml")
    shapes = {f"{prefix}{name.replace('blocks.', f'{path}.', 1)}": shape for name, shape in SHAPES.items()}
    assert detect(shapes, family).prefix == prefix
    with raises(FamilyError, f"{path}.3.attn.to_q.weight"):
        detect(shapes | {f"{prefix}{path}.3.attn.to_q.weight": (8, 8)}, family)


def test_two_models_in_one_file_are_refused() -> None:
    family = parse_family(OWN, "own.toml")
    with raises(FamilyError, " blocks.0.", " transformer.blocks.0."):
        detect(SHAPES | {f"transformer.{name}": shape for name, shape in SHAPES.items()}, family)


def test_layers_that_only_look_like_targets_can_be_named() -> None:
    """As the refiners of Lumina 2 do."""
    shapes = SHAPES | {"refiner.0.attn.to_q.weight": (8, 8)}
    with raises(FamilyError, "refiner.0.attn.to_q.weight"):
        detect(shapes, parse_family(OWN, "own.toml"))
    text = OWN.replace('first = "img_in.weight"', 'first = "img_in.weight"\nothers = ["refiner."]')
    assert len(detect(shapes, parse_family(text, "own.toml")).layout.layers) == 6


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"blocks.1.attn.to_q.weight": None}, "blocks.1.attn.to_q.weight"),
        ({"blocks.3.attn.to_q.weight": (8, 8)}, "blocks.3.attn.to_q.weight"),
        ({"txt_in.weight": (8, 32)}, "txt_in.weight"),
        ({"txt_in.weight": None}, "txt_in.weight"),
        (dict.fromkeys(name for name in SHAPES if name.startswith("blocks")), "blocks.0.img_mlp.net.0.proj.weight"),
    ],
)
def test_a_file_of_another_model_is_refused(changes: dict[str, tuple[int, ...] | None], key: str) -> None:
    shapes = {name: shape for name, shape in {**SHAPES, **changes}.items() if shape}
    with raises(FamilyError, key):
        detect(shapes, parse_family(OWN, "own.toml"))


SPECIAL = '\n[[special]]\nid = "y"\ntitle = "x"\narchitecture = "y"\nchannels = 24\n'
GEOMETRY = 'id = "u"\ntitle = "u"\n[unet]\ndown = [1]\nmid = 1\ncontext = 8\n'
WRONG = {
    "no TOML": ("id = ", "own.toml"),
    "a title that writes to the terminal": (OWN.replace("My model", "My\\u001b[31m model"), "title"),
    "a special title of two lines": (OWN + SPECIAL.replace('"x"', '"x\\ny"', 2), "special[1].title"),
    "too many residual blocks": (GEOMETRY.replace("context", "layers = 100000000\ncontext"), "unet.layers"),
    "no id": (OWN.replace('id = "own"', ""), "id is missing"),
    "an id of capitals": (OWN.replace('"own"', '"Own"'), "id is 'Own'"),
    "an unknown key": (OWN + "\ncolour = 1\n", "target[2].colour"),
    "neither": ('id = "own"\ntitle = "x"\n', "unet"),
    "both": (OWN + "\n[unet]\ndown = [1]\nmid = 1\ncontext = 8\n", "unet"),
    "an odd kind": (OWN.replace('kind = "attn"', 'kind = "norm"'), "target[2].kind"),
    "an unknown kind": (OWN.replace('["ff", "attn"]', '["ff", "norm"]'), "kinds"),
    "a default that is no kind": (OWN.replace('default = ["ff"]', 'default = ["attn2"]'), "default"),
    "no layout": (OWN.replace("[transformer.diffusers]", "[transformer.other]"), "transformer.other"),
    "no target": (OWN[: OWN.index("[[target]]")], "target is missing"),
    "no groups": (UNET.replace('groups = ["encoder", "decoder"]', ""), "unet.groups is missing"),
    "a group without a target": (UNET.replace('"decoder"]', '"decoder", "mid"]'), "unet.groups"),
    "a group twice": (UNET.replace('"decoder"]', '"decoder", "encoder"]'), "unet.groups"),
    "a target of no group": (UNET.replace('group = "decoder"\n', ""), "target[2].group is missing"),
    "a geometry and targets": (UNET.replace("[unet]", "[unet]\ndown = [1, 1]"), "unet.down"),
    "two ranges": (OWN.replace("blocks.{0..2}.attn", "{0..1}.{0..2}.attn"), "target[2].diffusers"),
    "an open range": (OWN.replace("blocks.{0..2}.attn", "blocks.{0..}.attn"), "target[2].diffusers"),
    "a range backwards": (OWN.replace("blocks.{0..2}.attn", "blocks.{2..0}.attn"), "2..0"),
    "a bomb": (OWN.replace("{0..2}", "{0..9999}"), "0..9999"),
    "a bias": (OWN.replace("to_q.weight", "to_q.bias"), "target[2].diffusers"),
    "sizes of text": (OWN.replace("[24]", '["24"]'), "sizes"),
    "no native": (OWN.replace('"512x512"', '"big"'), "native"),
    "a part of no block": (FUSED.replace("part = 0", "part = []"), "target[1].part"),
    "a part of text": (FUSED.replace("part = 0", 'part = "0"'), "target[1].part"),
    "a part with a hole": (FUSED.replace("part = 0", "part = [0, 2]"), "target[1].part"),
    "a part backwards": (FUSED.replace("part = 0", "part = [1, 0]"), "target[1].part"),
    "a part beyond": (FUSED.replace("part = 0", "part = [2, 3]"), "target[1].of"),
    "blocks without a part": (FUSED.replace("part = 0", ""), "target[1].part is missing"),
    "a part twice": (FUSED + FUSED[FUSED.index("[[target]]") :], "target has weights of 'blocks.0.mlp.0.weight' twice"),
    "a part in a part": (
        FUSED + FUSED[FUSED.index("[[target]]") :].replace("part = 0", "part = [0, 1]"),
        "target has weights of 'blocks.0.mlp.0.weight' twice",
    ),
    "parts of other blocks": (
        FUSED + FUSED[FUSED.index("[[target]]") :].replace("part = 0\nof = 3", "part = 1\nof = 2"),
        "target has weights of 'blocks.0.mlp.0.weight' twice",
    ),
    "a tensor twice": (
        OWN + OWN[OWN.rindex("[[target]]") :],
        "'blocks.0.attn.to_q.weight' twice",
    ),
    "a time of a UNet": (UNET.replace("[unet]\n", '[unet]\ntime = "fraction"\n'), "unet.time"),
    "a part of diffusers' layout": (OWN.replace('kind = "attn"', 'kind = "attn"\npart = 0'), "target[2].part"),
    "too long": ("#" * (MAX_TABLE + 1), "at most"),
    "depths of text": ('id = "u"\ntitle = "u"\n[unet]\ndown = ["1"]\nmid = 1\ncontext = 8\n', "unet.down"),
    "too few depths": ('id = "u"\ntitle = "u"\n[unet]\ndown = [[1]]\nmid = 1\ncontext = 8\n', "unet.down"),
    "no depth": ('id = "u"\ntitle = "u"\n[unet]\nmid = 1\ncontext = 8\n', "unet.down is missing"),
    "a special of nothing": (OWN + '\n[[special]]\nid = "x"\ntitle = "x"\narchitecture = "x"\n', "special[1].channels"),
    "a pipeline without a class": (OWN + '\n[pipeline]\nconfig = "a/b"\n', "pipeline.class"),
    "no steps": (OWN + PIPELINE + "steps = 0\n", "pipeline.steps"),
    "a list as a negative prompt": (OWN + PIPELINE + 'negative_prompt = ["a"]\n', "pipeline.negative_prompt"),
    "a list as an argument": (OWN + PIPELINE + "arguments = { sizes = [1] }\n", "'sizes'"),
    "an unknown time": (OWN.replace("[transformer]\n", '[transformer]\ntime = "noon"\n'), "transformer.time"),
    "an unknown program": ('programs = ["gimp"]\n' + OWN, "programs"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_in_a_table_is_named(case: str) -> None:
    text, key = WRONG[case]
    with raises(FamilyError, "own.toml", key):
        parse_family(text, "own.toml")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_special_model_may_be_told_by_a_tensor(prefix: str) -> None:
    special = (
        '\n[[special]]\nid = "pictures"\ntitle = "with pictures"\narchitecture = "x"\ntensors = ["a", "b.weight"]\n'
    )
    family = parse_family(OWN + special, "own.toml")
    shapes = {f"{prefix}{name}": shape for name, shape in SHAPES.items()}
    assert detect(shapes, family).special is None
    assert detect(shapes | {"other.b.weight": (4,)}, family).special is None
    found = detect(shapes | {f"{prefix}b.weight": (4,)}, family)
    assert found.special
    assert (found.special.id, found.title) == ("pictures", "My model, with pictures")


def test_a_special_model_of_two_signs_is_one() -> None:
    """As an inpainting model may have both channels and a tensor of its own."""
    special = '\n[[special]]\nid = "x"\ntitle = "with x"\narchitecture = "x"\nchannels = 24\ntensors = ["b.weight"]\n'
    family = parse_family(OWN + special, "own.toml")
    both = SHAPES | {"img_in.weight": (8, 24), "b.weight": (4,)}
    for gone in ("", "b.weight"):
        found = detect({name: shape for name, shape in both.items() if name != gone}, family).special
        assert found
        assert (found.id, found.title, found.channels) == ("x", "with x", 24)


def test_a_table_says_how_its_pipeline_draws() -> None:
    text = (
        'steps = 4\nguidance = 0\nguidance_argument = "scale"\nnegative_prompt = ""\narguments = { a = 1, b = false }\n'
    )
    usage = parse_family(OWN + PIPELINE + text, "own.toml").pipelines[""]
    assert (usage.steps, usage.guidance, usage.guidance_argument, usage.negative_prompt) == (4, 0.0, "scale", "")
    assert usage.arguments == {"a": 1, "b": False}
    assert (usage.network, usage.folder, usage.dtype) == ("FluxTransformer2DModel", "transformer", "bfloat16")
    plain = parse_family(OWN + PIPELINE, "own.toml").pipelines[""]
    assert (plain.steps, plain.guidance, plain.guidance_argument, plain.negative_prompt) == (
        None,
        None,
        "guidance_scale",
        None,
    )


def test_layouts_have_as_many_names() -> None:
    text = OWN.replace("[transformer.diffusers]", "[transformer.original]\n[transformer.diffusers]")
    text = text.replace("diffusers = ", 'original = "x.{0..1}.weight"\ndiffusers = ')
    with raises(FamilyError, "target[1].diffusers"):
        parse_family(text, "own.toml")


def test_tables_of_many_layers_are_refused_before_they_fill_the_memory() -> None:
    targets = "".join(f'[[target]]\nkind = "ff"\ndiffusers = "b{i}.{{0..999}}.weight"\n' for i in range(30))
    with raises(FamilyError, "target"):
        parse_family(OWN[: OWN.index("[[target]]")] + targets, "own.toml")


@pytest.mark.parametrize("seed", range(200))
def test_a_table_that_was_changed_anyhow_is_read_or_refused(seed: int) -> None:
    choose = random.Random(seed)
    text = choose.choice([UNET, *(table_of(family) for family in all_families())])
    for _ in range(choose.randint(1, 4)):
        at, end = sorted(choose.sample(range(len(text)), 2))
        end = min(end, at + choose.choice((1, 1, 20)))
        text = text[:at] + choose.choice(("", '"', "[", "]", "=", "{", "1", "\n", "-", text[at:end] * 2)) + text[end:]
    with suppress(FamilyError):
        parse_family(text, "own.toml")


@pytest.mark.parametrize("family", all_families(), ids=lambda family: family.id)
def test_the_table_of_a_built_in_family_can_be_a_users_own(family: object, tmp_path: Path) -> None:
    """What `crdiff families show` prints is a start."""
    name = family.id  # type: ignore[attr-defined]
    (tmp_path / "copy.toml").write_text(table_of(by_id(name)))
    own = load_family(tmp_path / "copy.toml")
    table = next(table for table in geometry_tables.names() if table.startswith(f"{name}."))
    shapes = {tensor: shape for tensor, (_, shape) in geometry_tables.load(table).items()}
    assert detect(shapes, own).layout == detect(shapes).layout
    assert tomllib.loads(own.table)["id"] == name


def test_the_tables_of_the_documentation_are_right() -> None:
    tables = re.findall(r"```toml\n(.*?)```", (DOCS / "families.md").read_text(encoding="utf-8"), re.DOTALL)
    assert [parse_family(table, "families.md").id for table in tables] == ["my-model", "my-unet", "my-other-unet"]


def test_a_package_may_bring_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name, value = "own", "package:TABLE"

        def load(self) -> str:
            return str(tmp_path / "own.toml")

    (tmp_path / "own.toml").write_text(OWN)
    monkeypatch.setattr(catalogue, "entry_points", lambda group: [Entry()] if group == "crdiff.families" else [])
    installed_families.cache_clear()
    try:
        match = detect(SHAPES)
        assert (match.family.id, match.family.table) == ("own", OWN)
        assert by_id("own").title == "My model"
        monkeypatch.setattr(Entry, "load", lambda self: 1 / 0)
        installed_families.cache_clear()
        with raises(FamilyError, "own: package:TABLE"):
            detect(SHAPES)
    finally:
        installed_families.cache_clear()
