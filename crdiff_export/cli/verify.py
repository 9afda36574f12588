"""`crdiff verify`."""

from pathlib import Path

from crdiff_export.cli import options
from crdiff_export.cli.command import command, option, option_group
from crdiff_export.cli.output import Output, Result, for_each

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
@options.files_argument
@option_group(
    "Base",
    option("--base BASE", "The base it was made from: a path, a folder, a Hub id or an alias.",
           shell_complete=options.complete_base),
    option("--calibration FILE", "The calibration it was made with, if it was made with one: then the mask is derived "
           "again, too.", options.FILE),
    options.device,
)  # fmt: skip
def verify(out: Output, files: tuple[Path, ...], base: str | None, calibration: Path | None, device: str) -> Result:
    """Check that FILE holds what its header says: counts, zeros and hash.

    With --base every target weight is derived again and compared bit by bit, and every other byte with the base's.
    Where a calibration has decided what goes, that takes --calibration; without it, only that nothing but zeros is new.
    Several files are checked one after the other. Exit code 3 if anything differs; with -q that is all there is to see.
    """
    if base:
        out.announce_base(base)
    return for_each(out, files, lambda file: _verify(out, file, base, calibration, device))


def _verify(out: Output, file: Path, base: str | None, calibration: Path | None, device: str) -> Result:
    from crdiff_export.packs import is_pack
    from crdiff_export.verify.verify import verify as run

    if is_pack(file):
        return _verify_pack(out, file, base, calibration, device)

    with out.threads_progress() as progress:
        verified = run(file, base, progress, device, calibration)
    checks = [f"{verified.weights:,} target weights"]
    checks += ["the SHA-256"] if verified.hashed else []
    checks += ["the residual"] if verified.residual in ("embedded", "sidecar") else []
    checks += [COMPARED[verified.against].format(verified.base)] if verified.base else []
    notes = [*verified.notes]
    if verified.residual == "missing":
        notes.append("its residual is in a sidecar that is not beside it, and was not checked")
    if verified.against == "zeros":
        notes.append(f"that {verified.stamp.criterion} would choose these zeros was not checked: give --calibration")
    if verified.against == "others":
        notes.append(
            f"{verified.stamp.criterion} has moved weights: the target weights that stay cannot be checked without "
            "--calibration"
        )
    if not verified.hashed and not verified.base:
        notes.append("the header has no hash (--no-hash); bytes outside the target weights were not checked")
    return Result(
        {
            "verified": True, "file": str(file), "weights": verified.weights, "hash": verified.hashed,
            "base": str(verified.base) if verified.base else None, "against_base": verified.against,
            "residual": verified.residual,
        },
        [f"{file}: holds what its header says ({', '.join(checks)})"],
        bare=(),
        notes=notes,
    )  # fmt: skip


def _verify_pack(out: Output, file: Path, base: str | None, calibration: Path | None, device: str) -> Result:
    from crdiff_export.formats.text import plural, printable
    from crdiff_export.packs.check import verify_pack

    with out.threads_progress() as progress:
        checked = verify_pack(file, base, progress, device, calibration)
    sizes = checked.pack.variants
    checks = [plural(len(sizes), "size"), "its SHA-256"]
    ranked = [str(size) for size in sizes if size not in checked.unranked]
    of_sizes = f" and what goes at {', '.join(ranked)}" if checked.unranked and ranked else ""
    what = f"the base's hash{of_sizes}" if checked.unranked else "thresholds and masks"
    checks += [f"{what} against {checked.base}"] if checked.base else []
    notes = [
        f"{size}: that {printable(sizes[size].criterion)} would choose this mask was not checked: "
        + ("give --calibration" if sizes[size].calibrated else "it is not installed")
        for size in checked.unranked
    ]
    return Result(
        {
            "verified": True, "file": str(file), "pack": True, "sizes": [str(size) for size in sizes], "hash": True,
            "base": str(checked.base) if checked.base else None, "unranked": [str(size) for size in checked.unranked],
        },
        [f"{file}: holds what its header says ({', '.join(checks)})"],
        bare=(),
        notes=notes,
    )  # fmt: skip
