"""`crdiff convert`."""

import time
from pathlib import Path

import click

from crdiff_export.cli import options
from crdiff_export.cli.blocks import Facts
from crdiff_export.cli.command import command, option, option_group
from crdiff_export.cli.output import Output, Result
from crdiff_export.convert import ConvertJob, ConvertRequest, prepare, run
from crdiff_export.formats.text import amount
from crdiff_export.models.families import LayoutName
from crdiff_export.sizes import Size


@command(
    "crdiff convert ./my-sdxl-folder --layout original -o my-sdxl.safetensors",
    "crdiff convert demo --layout diffusers -o demo-unet",
)
@options.base_argument
@option_group("Base", options.variant, options.family, options.native)
@option_group(
    "Output",
    option("-o, --output FILE", "Where to write: a .safetensors file in the original layout, a folder in diffusers'.",
           options.FILE, required=True),
    option("--layout", "The layout to write.", click.Choice(["original", "diffusers"]), required=True),
    options.dtype,
    option("--dry-run", "Show what would be done; read headers only, write nothing."),
    options.force,
)  # fmt: skip
def convert(
    out: Output, base: str, *, variant: str | None, family: Path | None, native: Size | None, output: Path,
    layout: LayoutName, dtype: str | None, dry_run: bool, force: bool,
) -> Result:  # fmt: skip
    """Write BASE in the other layout, without pruning it.

    A diffusers folder becomes one file with UNet, text encoders and VAE, as web UIs and ComfyUI open it (of SD3 and
    FLUX.1 the transformer alone); a file in the original layout becomes a diffusers folder of its UNet or transformer.
    Every weight keeps its bits. `crdiff export --layout` does the same while it prunes.
    """
    out.quiet_hub_client()
    out.announce_base(base)
    job = prepare(ConvertRequest(base, layout, output, variant, dtype, family, native, force))
    out.notes(job.plan.notes)
    if dry_run:
        return _result(job, None, None)
    began = time.monotonic()
    with out.threads_progress() as progress:
        written = run(job, progress)
    hashes = written.files[0].hashes
    return _result(job, hashes.output if hashes else None, time.monotonic() - began)


def _result(job: ConvertJob, digest: str | None, seconds: float | None) -> Result:
    """Describe a conversion; `digest` and `seconds` are None for a dry run."""
    planned, match = job.plan, job.plan.match
    size = sum(output.data_size for output in planned.outputs)
    tensors = sum(len(output.tensors) for output in planned.outputs)
    facts = {
        "base": f"{planned.checkpoint.path} ({match.title}, {job.source_layout})",
        "output": f"{job.request.output} ({match.layout.name}, {tensors} tensors, {amount(size)})",
    }
    if digest:
        facts["tensors"] = digest
    return Result(
        {
            "dry_run": digest is None, "base": str(planned.checkpoint.path), "output": str(job.request.output),
            "family": match.family.id,
            "source_layout": job.source_layout, "layout": match.layout.name, "tensors": tensors, "bytes": size,
            "hash_sha256": digest, "seconds": None if seconds is None else round(seconds, 3),
            "notes": list(planned.notes),
        },
        [Facts(list(facts.items()))],
        bare=[str(job.request.output)] if digest else [],
    )  # fmt: skip
