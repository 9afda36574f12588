"""An export in another layout beside the same export without the change: `python benchmarks/layout.py` (35 GB of disk).

It makes a diffusers folder of a full-size model with random weights in fp16 (`--model sd15` …), and runs, in
rounds whose order rotates and with the base out of the system's cache: `cp -r` with a sync; `crdiff export` of the
folder; the same with `--layout original`; and `crdiff convert`, which does not prune. Ratios are of the same round.
Hashes are computed anew in every run.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from export import HERE, RATIO, Run, drop, machine, measure

CP, EXPORT, LAYOUT, CONVERT = "cp -r, then sync", "export", "export --layout original", "convert"
CLIP = {"vocab_size": 49408, "max_position_embeddings": 77}
CLIP_L = {**CLIP, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "projection_dim": 768, "hidden_act": "quick_gelu"}  # fmt: skip
CLIP_H = {**CLIP, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
          "projection_dim": 512, "hidden_act": "gelu"}  # fmt: skip
CLIP_G = {**CLIP, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
          "projection_dim": 1280, "hidden_act": "gelu"}  # fmt: skip
# The text encoders of each model, by folder: the class of transformers, and its configuration.
ENCODERS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "sd15": {"text_encoder": ("CLIPTextModel", CLIP_L)},
    "sd21": {"text_encoder": ("CLIPTextModel", CLIP_H)},
    "sdxl": {"text_encoder": ("CLIPTextModel", CLIP_L), "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G)},
    "sdxl-refiner": {"text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G)},
}


def make_folder(folder: Path, model: str) -> Path:
    """Write a pipeline's folder with random weights, each component by a process of its own."""
    print(f"making a folder of {model} …", file=sys.stderr)
    script = "import sys; sys.path.insert(0, sys.argv[1]); import layout; layout.make_component(*sys.argv[2:])"
    for component in ("unet", "vae", *ENCODERS[model]):
        subprocess.run([sys.executable, "-c", script, HERE, folder, model, component], check=True)
    index: dict[str, Any] = {"_class_name": "DiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    index |= {"vae": ["diffusers", "AutoencoderKL"]}
    index |= {name: ["transformers", cls] for name, (cls, _) in ENCODERS[model].items()}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def make_component(folder: str, model: str, component: str) -> None:
    """Write one component: names and shapes by diffusers' and transformers' own classes, on the meta device."""
    import diffusers
    import torch
    import transformers
    from make_checkpoint import GEOMETRY, write

    target = Path(folder) / component
    target.mkdir(parents=True, exist_ok=True)
    name = "model" if component in ENCODERS[model] else "diffusion_pytorch_model"
    if component == "unet":
        import gzip

        table = json.loads(gzip.decompress((GEOMETRY / f"{model}.diffusers-unet.json.gz").read_bytes()))
    else:
        with torch.device("meta"):
            if component == "vae":
                module: Any = diffusers.AutoencoderKL(
                    block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
                    layers_per_block=2, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=512,
                )  # fmt: skip
                module.save_config(target)
            else:
                cls, config = ENCODERS[model][component]
                settings = transformers.CLIPTextConfig(**config)
                settings.save_pretrained(target)
                module = getattr(transformers, cls)(settings)
        # transformers 5 leaves out the first part of the names that the folders on the Hub have.
        bare = component in ENCODERS[model] and not any(key.startswith("text_model.") for key in module.state_dict())
        start = "text_model." if bare else ""
        table = {start + key: ["F16", list(tensor.shape)] for key, tensor in module.state_dict().items()}
    write(target / f"{name}.safetensors", table)


def ways(source: Path, out: Path) -> dict[str, list[str]]:
    """What to compare, by name."""
    crdiff = [sys.executable, "-m", "crdiff_export"]
    export = [*crdiff, "export", str(source), "--res", "512", "--ratio", RATIO, "--force", "--quiet", "--rehash"]
    one = str(out / "one.safetensors")
    return {
        CP: ["sh", "-c", 'cp -r "$1" "$2" && sync "$2"', "sh", str(source), str(out / "copy")],
        EXPORT: [*export, "-o", str(out / "folder")],
        LAYOUT: [*export, "--layout", "original", "-o", one],
        CONVERT: [*crdiff, "convert", str(source), "--layout", "original", "--quiet", "-o", one],
    }


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=ENCODERS, default="sdxl")
    parser.add_argument("--base", type=Path, help="a folder that this program has made")
    parser.add_argument("--make", type=Path, help="only make the folder there")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.make:
        make_folder(args.make, args.model)
        return
    folder = Path(tempfile.mkdtemp(prefix="crdiff-benchmark-", dir=args.folder))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    try:
        source = args.base or make_folder(folder / "base", args.model)
        found: dict[str, list[Run]] = {}
        for number in range(args.rounds):
            commands = list(ways(source, folder / "out").items())
            for name, command in commands[number % len(commands) :] + commands[: number % len(commands)]:
                (folder / "out").mkdir()
                for path in source.rglob("*.safetensors"):
                    drop(path)
                print(f"round {number + 1} of {args.rounds}: {name}", file=sys.stderr)
                found.setdefault(name, []).append(measure(command))
                shutil.rmtree(folder / "out")
        show(source, found)
    finally:
        shutil.rmtree(folder)


def show(source: Path, found: dict[str, list[Run]]) -> None:
    """The table: each way beside the export without a change of the same round."""
    size = sum(path.stat().st_size for path in source.rglob("*.safetensors"))
    print(f"{machine()}; {size / 1e9:.2f} GB\n")
    print("| way | median time | ratio to export (min to max) | processor time | peak memory |\n|---|---|---|---|---|")
    for name, runs in found.items():
        ratios = [run.seconds / export.seconds for run, export in zip(runs, found[EXPORT], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        seconds, cpu = (statistics.median(values) for values in zip(*((r.seconds, r.cpu) for r in runs), strict=True))
        print(f"| {name} | {seconds:.1f} s | {spread} | {cpu:.1f} s | {max(r.peak for r in runs):.0f} MB |")


if __name__ == "__main__":
    main()
