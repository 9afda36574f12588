"""The example workflow for ComfyUI: what is checked in is what the tool writes, and it fits the nodes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfyui_workflow
import numpy as np
import pytest
from example_workflow import two_sizes
from PIL import Image

from crdiff_export.models import recipe_files
from crdiff_export.sampling.comfyui import listing, nodes
from crdiff_export.sizes import Size

Json = dict[str, Any]
# Versions of FreeType, libjpeg and Pillow's quantiser differ by some levels of a few pixels.
LEVELS = 2.0


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {path.name: path for path in comfyui_workflow.write(tmp_path_factory.mktemp("written"))}


@pytest.fixture(scope="module")
def page() -> Json:
    made = json.loads((comfyui_workflow.FOLDER / f"{two_sizes.NAME}.json").read_text(encoding="utf-8"))
    assert isinstance(made, dict)
    return made


@pytest.fixture(scope="module")
def prompt() -> Json:
    return chunks(comfyui_workflow.FOLDER / f"{two_sizes.NAME}.png")["prompt"]


def chunks(picture: Path) -> dict[str, Json]:
    with Image.open(picture) as opened:
        return {name: json.loads(opened.info[name]) for name in ("prompt", "workflow")}


def test_the_files_are_those_of_the_tool(written: dict[str, Path]) -> None:
    assert {path.name for path in comfyui_workflow.FOLDER.iterdir()} == written.keys()
    for name, path in written.items():
        other = comfyui_workflow.FOLDER / name
        if path.suffix == ".json":
            assert path.read_bytes() == other.read_bytes()
            continue
        with Image.open(path) as one, Image.open(other) as two:
            assert (one.info.get("prompt"), one.info.get("workflow")) == (
                two.info.get("prompt"), two.info.get("workflow")
            )  # fmt: skip
            pixels = [np.asarray(picture.convert("RGB"), np.float64) for picture in (one, two)]
        assert pixels[0].shape == pixels[1].shape
        assert np.abs(pixels[0] - pixels[1]).mean() < LEVELS


def test_the_tool_writes_the_same_bytes_again(written: dict[str, Path], tmp_path: Path) -> None:
    for path in comfyui_workflow.write(tmp_path):
        assert path.read_bytes() == written[path.name].read_bytes()


def test_the_picture_has_the_workflow_as_text(page: Json) -> None:
    picture = comfyui_workflow.FOLDER / f"{two_sizes.NAME}.png"
    assert chunks(picture)["workflow"] == page
    data = picture.read_bytes()
    assert data.count(b"tEXtworkflow\0") == data.count(b"tEXtprompt\0") == 1
    assert max(data) < 256
    assert len(data) < 200_000


def test_the_prompt_is_that_of_the_page(page: Json, prompt: Json) -> None:
    assert dict(queued(page)) == prompt


def queued(page: Json) -> Iterator[tuple[str, Json]]:
    """Make the prompt of a page as ComfyUI's page does."""
    sources = {link[0]: [str(link[1]), link[2]] for link in page["links"]}
    for node in page["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        widgets = [each["name"] for each in node["inputs"] if "widget" in each]
        if "seed" in widgets:
            widgets.insert(widgets.index("seed") + 1, "control_after_generate")
        values = dict(zip(widgets, node["widgets_values"], strict=True))
        values.pop("control_after_generate", None)
        inputs = {each["name"]: sources[each["link"]] for each in node["inputs"] if each["link"]}
        yield str(node["id"]), {
            "inputs": {**values, **inputs}, "class_type": node["type"], "_meta": {"title": node["title"]},
        }  # fmt: skip


def test_every_link_has_two_ends_of_its_type(page: Json) -> None:
    by_id = {node["id"]: node for node in page["nodes"]}
    for number, source, output, target, slot, kind in page["links"]:
        start, end = by_id[source]["outputs"][output], by_id[target]["inputs"][slot]
        assert number in start["links"]
        assert end["link"] == number
        assert start["type"] == end["type"] == kind
    ends = [each["link"] for node in by_id.values() for each in node["inputs"] if each["link"]]
    starts = [number for node in by_id.values() for each in node["outputs"] for number in each["links"] or ()]
    assert sorted(ends) == sorted(starts) == list(range(1, page["last_link_id"] + 1))
    assert page["last_node_id"] == max(by_id)
    orders = {node["id"]: node["order"] for node in by_id.values()}
    assert all(orders[link[1]] < orders[link[3]] for link in page["links"])


def test_our_node_has_its_inputs(page: Json, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "packs", lambda: [two_sizes.PACK])
    ours = [node for node in page["nodes"] if node["type"] in nodes.NODE_CLASS_MAPPINGS]
    assert [node["type"] for node in ours] == [name for name in kinds(page) if name.startswith("Crdiff")]
    for node in ours:
        kind: Any = nodes.NODE_CLASS_MAPPINGS[node["type"]]
        declared = kind.INPUT_TYPES()
        types = {
            name: "COMBO" if isinstance(options[0], list) else options[0]
            for part in declared.values()
            for name, options in part.items()
        }
        assert {each["name"]: each["type"] for each in node["inputs"]} == types
        assert {each["name"] for each in node["inputs"] if each.get("shape") == 7} == declared["optional"].keys()
        for name, options in declared["required"].items():
            value = dict(zip([e["name"] for e in node["inputs"] if "widget" in e], node["widgets_values"], strict=True))
            assert name not in value or value[name] in options[0]
        assert [each["type"] for each in node["outputs"]] == list(kind.RETURN_TYPES)
        assert node["title"] == nodes.NODE_DISPLAY_NAME_MAPPINGS[node["type"]]


def kinds(page: Json) -> list[str]:
    return [node["type"] for node in page["nodes"]]


def test_the_sizes_are_in_the_recipe_and_in_the_note(page: Json) -> None:
    (note,) = (node["widgets_values"][0] for node in page["nodes"] if node["type"] == "MarkdownNote")
    sizes = [Size(*node["widgets_values"][:2]) for node in page["nodes"] if node["type"] == "EmptyLatentImage"]
    assert len(set(sizes)) == 2
    recipe = recipe_files.by_alias("sd15")
    assert recipe
    assert set(sizes) <= {variant.resolution for variant in recipe.variants}
    assert all(f"--res {size}" in note for size in sizes)
    assert two_sizes.CHECKPOINT in note
