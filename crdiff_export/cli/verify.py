"""`crdiff verify`."""

from pathlib import Path

from crdiff_export.cli import options
from crdiff_export.cli.command import command, option, option_group
from crdiff_export.cli.output import Output, Result

COMPARED = {
    "all": "every byte against {}",
    "zeros": "nothing but zeros new against {}",
    "others": "every byte but the pruned layers' against {}",
}


@command(
    "crdiff verify demo-96x64.safetensors",
    "crdiff verify demo-96x64.safetensors --base demo",
    "crdiff verify wanda.safetensors --base demo --calibration demo-wanda.safetensors",
)
@options.file_argument
@option_group(
    "Base",
    option("--base BASE", "The base it was made from: a path, a folder, a Hub id or an alias.",
           shell_complete=options.complete_base),
    option("--calibration FILE", "The calibration it was made with, if it was made with one: then the mask is derived "
           "again, too.", options.FILE),
    options.device,
)  # fmt: skip
def verify(out: Output, file: Path, base: str | None, calibration: Path | None, device: str) -> Result:
    """Check that FILE holds what its header says: counts, zeros and hash.

    With --base every target weight is derived again and compared bit by bit, and every other byte with the base's.
    Where a calibration has decided what goes, that takes --calibration; without it, only that nothing but zeros is new.
    Exit code 3 if anything differs; with -q that is all there is to see.
    """
    from crdiff_export.verify.verify import verify as run

    if base:
        out.announce_base(base)
    with out.threads_progress() as progress:
        found = run(file, base, progress, device, calibration)
    checks = [f"{found.weights:,} target weights"]
    checks += ["the SHA-256"] if found.hashed else []
    checks += ["the residual"] if found.residual in ("embedded", "sidecar") else []
    checks += [COMPARED[found.against].format(found.base)] if found.base else []
    notes = []
    if found.residual == "missing":
        notes.append("its residual is in a sidecar that is not beside it, and was not checked")
    if found.against == "zeros":
        notes.append(f"that {found.stamp.criterion} would choose these zeros was not checked: give --calibration")
    if found.against == "others":
        notes.append(
            f"{found.stamp.criterion} has moved weights: the target weights that stay cannot be checked without "
            "--calibration"
        )
    if not found.hashed:
        notes.append("the header has no hash (--no-hash); bytes outside the target weights were not checked")
    return Result(
        {
            "verified": True, "file": str(file), "weights": found.weights, "hash": found.hashed,
            "base": str(found.base) if found.base else None, "against_base": found.against,
            "residual": found.residual,
        },
        [f"{file}: holds what its header says ({', '.join(checks)})"],
        bare=(),
        notes=notes,
    )  # fmt: skip
