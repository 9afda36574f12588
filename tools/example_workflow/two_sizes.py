"""The example: one checkpoint, one pack, and two pictures that each take the masks of their own size."""

from example_workflow.graph import PAGE, Frame, Graph, Kind, Node

NAME = "crdiff-two-sizes"
CHECKPOINT, PACK = "v1-5-pruned-emaonly.safetensors", "sd15.crdiff"
PORTRAIT, LANDSCAPE = (512, 768), (768, 512)
SEED, STEPS, CFG = 1, 25, 7.0
NOTE = f"""\
## Each picture takes its own size

One loaded model draws both pictures. The node CR-Diff reads the size of each latent and prunes the model with the \
masks of that size.

1. Put a Stable Diffusion 1.5 checkpoint into `models/checkpoints`. It has to be the unpruned base.
2. In ComfyUI's folder make a pack of it:
   `crdiff pack create models/checkpoints/{CHECKPOINT} --res 512x768 --res 768x512 -o models/checkpoints/{PACK}`
3. Press R, choose both files in the two nodes at the top left, and run.

To compare, bypass CR-Diff (Ctrl+B): that is the unpruned model. At 512x512, the native size, the model stays \
unpruned in any case.

The input `weight` is that of pruned output amplification: 1 is the pruned model alone, more amplifies. Unconnected, \
each size takes the weight that the pack has for it.

The ratios that crdiff has for SD1.5 are starting points, not tuned values; `crdiff search` finds better ones.
"""

_LOADER = Kind(widgets={"ckpt_name": "COMBO"}, outputs={"MODEL": "MODEL", "CLIP": "CLIP", "VAE": "VAE"})
_PACK = Kind(
    inputs={"model": "MODEL", "weight": "FLOAT"},
    widgets={"pack": "COMBO"},
    outputs={"MODEL": "MODEL"},
    optional=("weight",),
)
_TEXT = Kind(inputs={"clip": "CLIP"}, widgets={"text": "STRING"}, outputs={"CONDITIONING": "CONDITIONING"})
_LATENT = Kind(widgets={"width": "INT", "height": "INT", "batch_size": "INT"}, outputs={"LATENT": "LATENT"})
_SAMPLER = Kind(
    inputs={"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
    widgets={
        "seed": "INT", "control_after_generate": PAGE, "steps": "INT", "cfg": "FLOAT", "sampler_name": "COMBO",
        "scheduler": "COMBO", "denoise": "FLOAT",
    },
    outputs={"LATENT": "LATENT"},
)  # fmt: skip
_DECODE = Kind(inputs={"samples": "LATENT", "vae": "VAE"}, outputs={"IMAGE": "IMAGE"})
_SAVE = Kind(inputs={"images": "IMAGE"}, widgets={"filename_prefix": "STRING"})
_NOTE = Kind(widgets={"text": PAGE}, virtual=True)


def two_sizes() -> Graph:
    """Describe the workflow."""
    return Graph(
        "0d5a3ab2-6a0c-4a0e-9d0f-3c6f5d7c2b11",
        {
            "loader": Node("CheckpointLoaderSimple", _LOADER, "Load Checkpoint", (20, 60, 360, 98), {}, (CHECKPOINT,)),
            "pack": Node("CrdiffPack", _PACK, "CR-Diff", (440, 60, 320, 84), {"model": ("loader", "MODEL")}, (PACK,)),
            "positive": _text("Prompt", (440, 230, 320, 150), "a snowy mountain above a lake at sunset, painting"),
            "negative": _text("Negative prompt", (440, 470, 320, 120), "blurry, deformed"),
            **_picture("portrait", PORTRAIT, (840, 60), (246, 420)),
            **_picture("landscape", LANDSCAPE, (840, 560), (350, 300)),
            "note": Node("MarkdownNote", _NOTE, "What to do", (20, 230, 360, 620), {}, (NOTE,)),
        },
        (
            Frame("Model and pack", (0, -20, 780, 910), "#3f5159"),
            Frame(f"Portrait {_text_of(PORTRAIT)}", (810, -20, 1160, 510), "#3f4d66"),
            Frame(f"Landscape {_text_of(LANDSCAPE)}", (810, 500, 1160, 390), "#5a4a3f"),
        ),
    )


def _text(title: str, box: tuple[int, int, int, int], text: str) -> Node:
    return Node("CLIPTextEncode", _TEXT, title, box, {"clip": ("loader", "CLIP")}, (text,))


def _picture(name: str, size: tuple[int, int], corner: tuple[int, int], save: tuple[int, int]) -> dict[str, Node]:
    """Describe the nodes of one picture: its latent, sampler, decoder and file."""
    (x, y), (width, height) = corner, save
    sampler = {
        "model": ("pack", "MODEL"), "positive": ("positive", "CONDITIONING"),
        "negative": ("negative", "CONDITIONING"), "latent_image": (f"{name} latent", "LATENT"),
    }  # fmt: skip
    decoder = {"samples": (f"{name} sampler", "LATENT"), "vae": ("loader", "VAE")}
    return {
        f"{name} latent": Node("EmptyLatentImage", _LATENT, _text_of(size), (x, y + 156, 220, 106), {}, (*size, 1)),
        f"{name} sampler": Node(
            "KSampler", _SAMPLER, "KSampler", (x + 280, y, 270, 262), sampler,
            (SEED, "fixed", STEPS, CFG, "euler", "normal", 1.0),
        ),
        f"{name} decoder": Node("VAEDecode", _DECODE, "VAE Decode", (x + 600, y, 130, 46), decoder),
        f"{name} file": Node(
            "SaveImage", _SAVE, "Save Image", (x + 760, y, width, height),
            {"images": (f"{name} decoder", "IMAGE")}, (f"crdiff-{name}",),
        ),
    }  # fmt: skip


def _text_of(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
