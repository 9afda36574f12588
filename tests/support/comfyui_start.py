"""Start a ComfyUI on the CPU for a check, and what the checks compare. Imported before ComfyUI's own modules.

The command line has ComfyUI's folder and a folder to work in, which has the nodes in `custom_nodes`.
"""

import importlib.abc
import importlib.machinery
import io
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMFYUI, WORK = (Path(word).resolve() for word in sys.argv[1:3])
sys.argv = [str(COMFYUI / "main.py"), *sys.argv[3:]]
sys.path.insert(0, str(COMFYUI))


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for packages that a ComfyUI imports at its start, that this check does not use, and that are not there."""

    NAMES = ("torchvision", "torchaudio", "torchsde", "kornia", "spandrel", "av")

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        known = name.partition(".")[0] in self.NAMES
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: Any) -> Any:
        module = types.ModuleType(spec.name)
        vars(module)["__getattr__"] = _missing
        return module

    def exec_module(self, module: Any) -> None:
        pass


class _Missing(type):
    """The type of what such a package has: classes whose attributes are classes."""

    def __getattr__(cls, name: str) -> type:
        return _missing(name)


def _missing(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Missing(name, (), {})


sys.meta_path.append(Absent())
# A fork (ComfyUI-Zluda) installs packages when this module is imported.
sys.modules["comfy.zluda"] = types.ModuleType("comfy.zluda")

from comfy.cli_args import args  # noqa: E402

args.cpu = True

import comfy.model_management as management  # noqa: E402
import nodes  # noqa: E402

WEIGHT, BAKED = 1.7, "baked.safetensors"


def poa(model: Any, name: str = BAKED, weight: float = WEIGHT, start: float = 0.0, stop: float = 1.0) -> Any:
    node = nodes.NODE_CLASS_MAPPINGS["CrdiffPoa"]()
    return node.patch(model, name, weight_from_file=False, weight=weight, start=start, stop=stop)[0]


def follow(model: Any, name: str, weight: float | None = None) -> Any:
    """The model with a pack."""
    node = nodes.NODE_CLASS_MAPPINGS["CrdiffPack"]()
    return node.patch(model, name, **({} if weight is None else {"weight": weight}))[0]


def mixed(dense: Any, pruned: Any, weight: Callable[[float], float]) -> Any:
    """A model that asks two models, each with weights of its own: what POA has to be equal to."""
    management.load_models_gpu([pruned])
    both = dense.clone()

    def ask(apply_model: Any, given: Any) -> Any:
        w = weight(float(given["timestep"][0]))
        c = dict(given["c"])
        options = {k: v for k, v in c.pop("transformer_options").items() if k != "wrappers"}
        control = c.pop("control", None)
        copies = [{k: list(v) for k, v in control.items()} if control else None for _ in range(2)]
        first = apply_model(given["input"], given["timestep"], transformer_options=options, control=copies[0], **c)
        second = pruned.model.apply_model(
            given["input"], given["timestep"], transformer_options=options, control=copies[1], **c
        )
        return first if w == 0 else (1 - w) * first + w * second

    both.set_model_unet_function_wrapper(ask)
    return both


def far(one: Any, other: Any) -> float:
    return float((one - other).abs().max() / other.abs().max())


def said(call: Callable[[], Any]) -> str:
    """What is raised, or else what is logged."""
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    logging.getLogger().addHandler(handler)
    try:
        call()
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    finally:
        logging.getLogger().removeHandler(handler)
    return heard.getvalue()
