"""POA while sampling: `python benchmarks/poa.py` (SD1.5's UNet with random weights; `--model sdxl` for SDXL's).

It calls a UNet with a batch for guidance, in turn and paired: dense, with POA one pass after the other, with POA in one
pass over a doubled batch, with a second copy of the weights, as the public code has it, and the pruned model alone: of
one size, and following the size of the picture from a pack. It prints medians of the ratios to the dense call of the
same round, and what a change of the size costs with the pack. Each way also runs in a process of its own for its peak
memory, the device's where there is one, as multiples of the weights above the dense way's.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from crdiff_export import ExportRequest, Size
from crdiff_export.packs import create
from crdiff_export.progress import Silent
from crdiff_export.prune.plan_request import PlanRequest
from crdiff_export.sampling import poa

W = 1.5
RATIO = 0.3
WAYS = ("dense", "sequential", "batched", "two copies", "pruned", "pack, pruned")
SDXL = {
    "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), "use_linear_projection": True,
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (5, 10, 20),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {"sd15": {"cross_attention_dim": 768}, "sdxl": SDXL}
# glibc gives freed memory back to the system and takes it again at every call, in some states of the process and not in
# others, which is worth up to a quarter of a call's time on a CPU. Timings keep it; peaks of memory do not.
STEADY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
Call = Callable[[], Any]


def base(model: str, folder: Path, dtype: torch.dtype) -> Path:
    """A UNet with random weights, on disk."""
    path = folder / "diffusion_pytorch_model.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        UNet2DConditionModel(**MODELS[model]).save_pretrained(folder)
        torch.set_default_dtype(torch.float32)
    return path


def load(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """The UNet, as a pipeline has it."""
    return UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype).to(device).eval()


def inputs(
    model: str, size: int, batch: int, dtype: torch.dtype, device: str, height: int | None = None
) -> dict[str, Any]:
    """Arguments for a picture of `size` pixels, a square if no height is given, with guidance."""
    made: dict[str, Any] = {
        "sample": torch.randn(batch, 4, (height or size) // 8, size // 8),
        "encoder_hidden_states": torch.randn(batch, 77, MODELS[model]["cross_attention_dim"]),
    }
    if model == "sdxl":
        made["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, 1280), "time_ids": torch.full((batch, 6), 512.0)}

    def move(value: Any) -> Any:
        return {k: move(v) for k, v in value.items()} if isinstance(value, dict) else value.to(device, dtype)

    return {**move(made), "timestep": 500, "return_dict": False}


def pack_of(file: Path, size: int) -> Path:
    """A pack of two sizes, written once."""
    path = file.with_suffix(".crdiff")
    if not path.exists():
        sizes = Size(size, size), Size(size, other_side(size))
        plans = tuple(PlanRequest(str(file), each, ratio=RATIO) for each in sizes)
        create.make(create.prepare_new(create.PackRequest(plans, path)), Silent())
    return path


def other_side(size: int) -> int:
    """The height of the pack's second size."""
    return size * 5 // 4 // 64 * 64


def changes(unet: Any, pack: Path, calls: Sequence[Call], rounds: int, device: str) -> list[float]:
    """Seconds that a change of size costs: a call after it less another one at the same size."""
    poa.enable(unet, pack, 1.0, check=False)
    found = []
    for number in range(2 * rounds):
        first, second = (timed(calls[number % 2], device) for _ in range(2))
        found.append(first - second)
    poa.disable(unet)
    return found[2:]


def call_of(
    way: str, unet: Any, source: poa.Source, arguments: dict[str, Any], other: Any = None, pack: Path | None = None
) -> Call:
    """One denoising call."""

    def call() -> Any:
        with torch.inference_mode():
            found = unet(**arguments)[0]
            return (1 - W) * found + W * other(**arguments)[0] if way == "two copies" else found

    poa.disable(unet)
    if way in ("sequential", "batched"):
        poa.enable(unet, source, W, mode="sequential" if way == "sequential" else "batched", check=False)
    elif way == "pruned":
        poa.prune(unet, source, check=False)
    elif pack and way == "pack, pruned":
        poa.enable(unet, pack, 1.0, check=False)
        call()  # the change of size
    return call


def timed(call: Call, device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(device: str) -> int:
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


def copy_of(unet: Any, source: poa.Source) -> Any:
    """A second model with the pruned weights."""
    import copy

    from crdiff_export.sampling.poa.masks import prune

    other = copy.deepcopy(unet)
    with torch.no_grad():
        for name, cuts in source.masks.diffusers.items():
            weight = other.get_parameter(name)
            weight.copy_(prune(weight, cuts))
    return other


def memory(folder: Path, ways: Sequence[str]) -> dict[str, int]:
    """Peak memory of each way, in a process of its own."""
    found = {}
    for way in ways:
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder), "--memory-of", way]
        plain = {name: value for name, value in os.environ.items() if name not in STEADY}
        ran = subprocess.run(command, check=True, capture_output=True, text=True, env=plain)
        found[way] = int(ran.stdout.split()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--size", type=int, default=512, help="pixels")
    parser.add_argument("--batch", type=int, default=2, help="2 is one picture with guidance")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="where the weights lie or are put")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="beside the dense model")
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.memory_of and not STEADY.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **STEADY})
    dtype = torch.float32 if options.device == "cpu" else torch.float16
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        file = base(options.model, folder, dtype)
        source = poa.from_recipe(ExportRequest(str(file), Size(options.size, options.size), ratio=RATIO))
        pack = pack_of(file, options.size)
        unet = load(folder, dtype, options.device)
        weights = sum(p.numel() * p.itemsize for p in unet.parameters())
        arguments = inputs(options.model, options.size, options.batch, dtype, options.device)
        if options.memory_of:
            other = copy_of(unet, source) if options.memory_of == "two copies" else None
            call = call_of(options.memory_of, unet, source, arguments, other, pack)
            for _ in range(4):  # what is freed in pieces is not all found again at once
                call()
            print(peak(options.device))
            return
        ways = ("dense", *(way for way in WAYS if way in options.ways and way != "dense"))
        peaks = memory(folder, ways)
        other = copy_of(unet, source) if "two copies" in ways else None
        call_of("sequential", unet, source, arguments)()
        held = 1 + unet.crdiff_poa.extra_bytes / weights
        times: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(options.rounds + 1):
            for way in ways:
                call = call_of(way, unet, source, arguments, other, pack)
                seconds = timed(call, options.device)
                if number:  # the first round warms up
                    times[way].append(seconds)
        in_place = poa.prune(unet, source, check=False).extra_bytes / weights
        poa.disable(unet)
        tall = inputs(options.model, options.size, options.batch, dtype, options.device, other_side(options.size))
        calls = [call_of("dense", unet, source, given) for given in (arguments, tall)]
        change = statistics.median(changes(unet, pack, calls, options.rounds, options.device))
    device = torch.cuda.get_device_name() if options.device != "cpu" else f"{platform.machine()} CPU"
    rows = {}
    for way in ways:
        ratios = [t / dense for t, dense in zip(times[way], times["dense"], strict=True)]
        rows[way] = {
            "seconds": statistics.median(times[way]), "ratio": statistics.median(ratios),
            "least": min(ratios), "most": max(ratios), "peak": peaks[way],
            "weights": 1 + (peaks[way] - peaks["dense"]) / weights,
        }  # fmt: skip
    report = {"model": options.model, "size": options.size, "batch": options.batch, "device": device,
              "threads": torch.get_num_threads(), "dtype": str(dtype), "weights": weights, "held": held,
              "in_place": in_place, "change_seconds": change,
              "ways": rows}  # fmt: skip
    print(json.dumps(report)) if options.json else show(report)


def show(report: dict[str, Any]) -> None:
    """Print the figures as a table."""
    rows, weights, change = report["ways"], report["weights"], report["change_seconds"]
    print(f"{report['model']} at {report['size']}, batch {report['batch']}, {report['dtype']}, {report['device']}, "
          f"{report['threads']} threads")  # fmt: skip
    print(f"{weights / 1e9:.2f} GB of weights; held with POA, one pass after the other: {report['held']:.4f} of them")
    print(f"pruned in place: {report['in_place']:.4f} of them beside the model; a change of size: {change:.2f} s, "
          f"{change / rows['dense']['seconds']:.2f} dense calls")  # fmt: skip
    print("| way | median time | ratio to dense (min to max) | peak memory | in weights |\n|---|---|---|---|---|")
    for way, row in rows.items():
        print(f"| {way} | {row['seconds']:.3f} s | {row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f}) "
              f"| {row['peak'] / 1e9:.2f} GB | {row['weights']:.3f} |")  # fmt: skip


if __name__ == "__main__":
    main()
