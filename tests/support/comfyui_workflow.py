"""The example workflow in a real ComfyUI, on the CPU: run by tests/sampling/test_comfyui_real.py with ComfyUI's Python.

    python -m tests.support.comfyui_workflow COMFYUI WORK

WORK holds a checkpoint, a pack of it, and the exports of the pack's sizes. Prints one JSON object.
"""

import asyncio
import copy
import hashlib
import inspect
import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.support.comfyui_start import WORK

# isort: split
import execution
import folder_paths
import nodes
import torch
from aiohttp import ClientSession, web
from app.custom_node_manager import CustomNodeManager
from PIL import Image

NODES = WORK / "custom_nodes" / "crdiff"
WORKFLOW = NODES / "example_workflows" / "crdiff-two-sizes.png"
CHECKPOINT = "v1-5-pruned-emaonly.safetensors"
STEPS, CFG = 2, 1.0


class Server:
    """What ComfyUI's executor needs of a server."""

    client_id = last_node_id = last_prompt_id = None

    def send_sync(self, *_: Any) -> None:
        """Drop what would be sent to the page."""


def new_executor() -> Any:
    """ComfyUI's executor; newer versions want numbers for a cache that is not used here."""
    wanted = inspect.signature(execution.PromptExecutor).parameters
    more = {"cache_args": {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}} if "cache_args" in wanted else {}
    return execution.PromptExecutor(Server(), cache_type=execution.CacheType.CLASSIC, **more)


def chunk(name: str) -> Any:
    """A chunk of the picture that a user drops into the page."""
    with Image.open(WORKFLOW) as picture:
        return json.loads(picture.info[name])


def fast(prompt: dict[str, Any]) -> dict[str, Any]:
    """The prompt with few steps, without guidance, and with pictures of half the width and height."""
    changed = copy.deepcopy(prompt)
    for node in of_class(changed, "KSampler"):
        node["inputs"].update(steps=STEPS, cfg=CFG)
    for node in of_class(changed, "EmptyLatentImage"):
        node["inputs"].update({side: node["inputs"][side] // 2 for side in ("width", "height")})
    return changed


def of_class(prompt: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [node for node in prompt.values() if node["class_type"] == name]


def without_node(prompt: dict[str, Any], checkpoint: str, only: str) -> dict[str, Any]:
    """The prompt in which the samplers take the loader's model; `only` is the file that is saved."""
    changed = copy.deepcopy(prompt)
    (loader,) = of_class(changed, "CheckpointLoaderSimple")
    loader["inputs"]["ckpt_name"] = checkpoint
    (pack,) = (number for number, node in changed.items() if node["class_type"] == "CrdiffPack")
    source = changed.pop(pack)["inputs"]["model"]
    for node in changed.values():
        node["inputs"] = {key: source if value == [pack, 0] else value for key, value in node["inputs"].items()}
    others = [number for number, node in changed.items() if node["inputs"].get("filename_prefix", only) != only]
    return {number: node for number, node in changed.items() if number not in others}


def run(prompt: dict[str, Any], folder: str) -> dict[str, Any]:
    """Validate and execute a prompt as ComfyUI's server does; what the saved pictures are."""
    output = WORK / folder
    output.mkdir()
    folder_paths.set_output_directory(str(output))
    valid, error, outputs, errors = asyncio.run(execution.validate_prompt(folder, prompt, None))
    assert valid, (error, errors)
    # An executor of its own: it keeps nodes, and a node that saves keeps its folder.
    executor, started = new_executor(), time.monotonic()
    executor.execute(prompt, folder, {}, outputs)
    sys.stderr.write(f"{folder}: {time.monotonic() - started:.0f} s\n")
    assert executor.success, executor.status_messages[-1]
    return {path.name: about(path) for path in sorted(output.iterdir())}


def about(path: Path) -> dict[str, Any]:
    with Image.open(path) as picture:
        pixels = picture.convert("RGB").tobytes()
        return {"size": picture.size, "sha256": hashlib.sha256(pixels).hexdigest(), "values": len(set(pixels))}


def page_errors(workflow: dict[str, Any]) -> list[str]:
    """Where nodes on the page differ from what their classes declare."""
    errors = []
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        kind = nodes.NODE_CLASS_MAPPINGS[node["type"]]
        declared = {k: v for part in ("required", "optional") for k, v in kind.INPUT_TYPES().get(part, {}).items()}
        types = {key: "COMBO" if isinstance(value[0], list) else value[0] for key, value in declared.items()}
        if {each["name"]: each["type"] for each in node["inputs"]} != types:
            errors.append(f"{node['type']}: inputs {types}")
        # Newer versions give SaveImage an output, which the page adds where a workflow has none.
        outputs = [each["type"] for each in node["outputs"]]
        if outputs != list(kind.RETURN_TYPES[: len(outputs)]):
            errors.append(f"{node['type']}: outputs {kind.RETURN_TYPES}")
        widgets = [each["name"] for each in node["inputs"] if "widget" in each]
        if widgets != [key for key in types if key in widgets]:
            errors.append(f"{node['type']}: order of widgets {list(types)}")
    return errors


async def templates() -> dict[str, Any]:
    """What ComfyUI's server says of the templates, and the first bytes of each file that it serves."""
    routes, application = web.RouteTableDef(), web.Application()
    CustomNodeManager().add_routes(routes, application, nodes.LOADED_MODULE_DIRS.items())
    application.add_routes(routes)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with ClientSession() as session:
            async with session.get(f"{address}/workflow_templates") as answer:
                listed = await answer.json()
            served = {}
            for suffix in ("json", "png", "jpg"):
                async with session.get(f"{address}/api/workflow_templates/crdiff/{WORKFLOW.stem}.{suffix}") as answer:
                    served[suffix] = hashlib.sha256(await answer.read()).hexdigest() if answer.ok else answer.status
    finally:
        await runner.cleanup()
    return {"listed": listed, "served": served}


def project() -> dict[str, Any]:
    """What ComfyUI reads of the folder's `pyproject.toml`."""
    from comfy_config.config_parser import extract_node_configuration

    return dict(extract_node_configuration(str(NODES)).model_dump())


def main() -> None:
    started = time.monotonic()
    results: dict[str, Any] = {"loaded": asyncio.run(nodes.load_custom_node(str(NODES)))}
    folder_paths.folder_names_and_paths["custom_nodes"] = ([str(NODES.parent)], set())
    folder_paths.add_model_folder_path("checkpoints", str(WORK / "checkpoints"))
    results["templates"] = asyncio.run(templates())
    results["project"] = project()
    results["page errors"] = page_errors(chunk("workflow"))
    prompt = fast(chunk("prompt"))
    results["with the node"] = run(prompt, "with-node")
    for name in ("portrait", "landscape"):
        alone = without_node(prompt, f"{name}.safetensors", f"crdiff-{name}")
        results[f"exported for {name}"] = run(alone, name)
    results["unpruned"] = run(without_node(prompt, CHECKPOINT, "crdiff-portrait"), "unpruned")
    results["seconds"] = time.monotonic() - started
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
