"""`crdiff verify`."""

from pathlib import Path

import click

from crdiff_export.cli.options import announce, complete_alias, device_option, examples, output_options
from crdiff_export.cli.signals import Stopper

_AGAINST = {
    "all": "every byte against {}",
    "zeros": "nothing but zeros new against {}",
    "others": "every byte but the pruned layers' against {}",
}


@click.command(
    epilog=examples(
        "crdiff verify demo-96x64.safetensors",
        "crdiff verify demo-96x64.safetensors --base demo",
        "crdiff verify wanda.safetensors --base demo --calibration demo-wanda.safetensors",
    )
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--base", shell_complete=complete_alias, help="The base it was made from: a path, a folder, a Hub id or an alias."
)
@click.option(
    "--calibration", type=click.Path(path_type=Path), metavar="FILE",
    help="The calibration it was made with, if it was made with one: then the mask is derived again, too.",
)  # fmt: skip
@device_option
@output_options
@click.pass_obj
def verify(
    stopper: Stopper, /, file: Path, base: str | None, calibration: Path | None, device: str, *, json: bool, quiet: bool
) -> None:
    """Check that FILE holds what its header says: counts, zeros and hash.

    With --base every target weight is derived again and compared bit by bit, and every other byte with the base's.
    Where a calibration has decided what goes, that takes --calibration; without it, only that nothing but zeros is new.
    Exit code 3 if anything differs; with -q that is all there is to see.
    """
    from crdiff_export.cli import output
    from crdiff_export.verify.verify import verify as check

    if base:
        announce(base, quiet=quiet or json)
    with output.progress(quiet=quiet or json) as shown, stopper.watch(shown) as progress:
        found = check(file, base, progress, device, calibration)
    if json:
        output.print_json({
            "verified": True, "file": str(file), "weights": found.weights, "hash": found.hashed,
            "base": str(found.base) if found.base else None, "against_base": found.against,
            "residual": found.residual,
        })  # fmt: skip
        return
    if quiet:
        return
    parts = [f"{found.weights:,} target weights"]
    parts += ["the SHA-256"] if found.hashed else []
    parts += ["the residual"] if found.residual in ("embedded", "sidecar") else []
    parts += [_AGAINST[found.against].format(found.base)] if found.base else []
    output.line(f"{file}: holds what its header says ({', '.join(parts)})")
    if found.residual == "missing":
        output.note("its residual is in a sidecar that is not beside it, and was not checked")
    if found.against == "zeros":
        output.note(f"that {found.stamp.criterion} would choose these zeros was not checked: give --calibration")
    if found.against == "others":
        output.note(
            f"{found.stamp.criterion} has moved weights: the target weights that stay cannot be checked without "
            "--calibration"
        )
    if not found.hashed:
        output.note("the header has no hash (--no-hash); bytes outside the target weights were not checked")
