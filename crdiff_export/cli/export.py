"""`crdiff export`."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from crdiff_export.bake.residual import NONE, WAYS
from crdiff_export.cli import export_text, options, sheet
from crdiff_export.cli.command import command, gather, option, option_group
from crdiff_export.cli.output import Output, Result
from crdiff_export.cli.push import push_result, transfer
from crdiff_export.errors import CrdiffError, OptionError
from crdiff_export.export import Baked, ExportJob, ExportRequest, Failure, prepare_all, run_together
from crdiff_export.models.families import LayoutName
from crdiff_export.packs import open_source
from crdiff_export.prune import kernels
from crdiff_export.publish.request import PushRequest, check_request
from crdiff_export.publish.request import prepare as check_destination
from crdiff_export.publish.target import Destination
from crdiff_export.sizes import Size

if TYPE_CHECKING:
    from crdiff_export.sampling.drawing_setup import DrawingSetup


@command(
    "crdiff export sdxl --res 2048 -o sdxl-2048.safetensors",
    "crdiff export my-sd15.safetensors --res 400x560 --ratio 0.2 --up 0.3",
    "crdiff export sdxl --res 2048 --push my-org/sdxl-crdiff",
    "crdiff export sdxl --res 512 --criterion wanda:compare=row --calibration sdxl-512.safetensors",
    "crdiff export ./my-sdxl-folder --res 2048 --layout original -o my-sdxl-2048.safetensors",
    "crdiff export demo --res 96x64 --dry-run",
)
@options.base_argument
@option_group("Base", options.variant, options.family)
@option_group(
    "Size",
    options.sizes,
    options.native,
    option("--pack PACK", "Prune what a pack says (crdiff pack), in place of a recipe: nothing is counted. A file, or "
           "hf://ORG/NAME/FILE.", shell_complete=options.complete_file),
)  # fmt: skip
@options.ratio_options
@option_group(
    "Ratios",
    options.prompt_of_numbers,
    options.poa_weight,
)
@options.criterion_options
@option_group("Criterion", options.targets)
@option_group("Computing", options.device, options.threads, options.rehash)
@option_group(
    "Output",
    option("-o, --output FILE", "Where to write; {size} in it stands for the size, and a folder that exists gets the "
           "default name. Default: STEM-crdiff-WxH.safetensors in the current folder; a folder for a sharded base or a "
           "diffusers folder.", options.FILE),
    options.dtype,
    options.layout,
    option("--residual", "Keep what is pruned away, for crdiff restore: in the file itself, or in a sidecar beside it.",
           click.Choice(list(WAYS)), default=NONE, show_default=True),
    option("--thumbnail PROMPT", "Draw a picture of the pruned model into the header, for programs that show it. Its "
           "bytes depend on the device; crdiff verify does not look at it."),
    option("--no-hash", "Leave the SHA-256 of base and output out of the header."),
    options.allow_nonfinite,
    option("--all-files", "Copy all files of a diffusers folder. Default: those of its pipeline."),
    option("--dry-run", "Show what would be done; read headers only, write nothing."),
    options.force,
)  # fmt: skip
@option_group(
    "Hub", option("--push REPO", "Then push it to the Hub repository REPO (ORG/NAME), with a card.", dest="repo")
)
@options.push_options
@gather("push", partial(PushRequest, ""))
def export(
    out: Output, base: str, sizes: tuple[Size, ...], *, family: Path | None, native: Size | None, output: Path | None,
    recipe: Path | None, prompt: str | None, ratio: float | None, ratios: Mapping[str, float], poa_weight: float | None,
    targets: tuple[str, ...] | None, criterion: str, calibration: Path | None, device: str, threads: int | None,
    dtype: str | None, variant: str | None, residual: str, no_hash: bool, allow_nonfinite: bool, all_files: bool,
    dry_run: bool, force: bool, repo: str | None, push: PushRequest, thumbnail: str | None,
    previews: tuple[str, ...], rehash: bool, pack: str | None,
    layout: LayoutName | None,
) -> Result:  # fmt: skip
    """Prune BASE for a size and write a new checkpoint with everything about it in its header.

    BASE is a path to a checkpoint or diffusers folder, a Hub id (ORG/NAME), hf://ORG/NAME/FILE, or an alias
    (`crdiff recipes list`). The output appears under its name only when it is complete and checked. Of several sizes,
    one that fails does not stop the others.
    """
    out.quiet_hub_client()
    if pack is not None:
        _refuse_numbers(pack)
    pushing = _push_request(repo, push, previews)
    opened = open_source(pack) if pack is not None else None
    request = ExportRequest(
        base, sizes[0], None, recipe=recipe, prompt=prompt, ratio=ratio, ratios=ratios, poa_weight=poa_weight,
        targets=targets, criterion=criterion, calibration=calibration, device=device, dtype=dtype, variant=variant,
        residual=residual, hashing=not no_hash, force=force, allow_nonfinite=allow_nonfinite, all_files=all_files,
        threads=threads, family=family, native=native, rehash=rehash, pack=opened, layout=layout,
    )  # fmt: skip
    requests = [
        replace(request, size=size, output=named)
        for size, named in zip(dict.fromkeys(sizes), _outputs(output, sizes), strict=True)
    ]
    if pushing and len(requests) > 1 and pushing.path and not pushing.path.endswith("/"):
        raise OptionError(
            f"--path-in-repo {pushing.path}: {len(requests)} sizes need a path each",
            "Give a folder, with a / at its end.",
        )
    out.announce_base(base)
    destination = _destination(pushing, requests[0]) if pushing and not dry_run else None
    jobs = prepare_all(requests)
    out.notes(_each(jobs, [job.plan.notes for job in jobs]))
    setups = [_prepare_thumbnail(job, thumbnail) for job in jobs] if thumbnail is not None else []
    if dry_run:
        if device not in ("auto", "cpu"):
            kernels.load(device)  # raises where it is not there
        return export_text.all_planned([export_text.planned(job, pushing) for job in jobs])
    if thumbnail is not None:
        jobs = [_with_thumbnail(out, job, setup, thumbnail) for job, setup in zip(jobs, setups, strict=True)]
    began = time.monotonic()
    with out.threads_progress() as progress:
        outcomes = list(run_together(jobs, progress))
    seconds = time.monotonic() - began
    out.notes(_each(jobs, [() if isinstance(outcome, Failure) else outcome.notes for outcome in outcomes]))
    push_one = partial(_push, out, previews, destination, family) if destination else None
    if len(jobs) == 1:
        return _show_one(outcomes[0], seconds, pushing, push_one)
    return export_text.all_done(jobs, outcomes, _push_all(out, outcomes, pushing, push_one), seconds)


# What a pack has decided: parameters of the command, by the options that set them.
_DECIDED = {
    "recipe": "--recipe", "ratio": "--ratio", "down": "--down", "mid": "--mid", "up": "--up", "prompt": "--prompt",
    "poa_weight": "--poa-weight", "criterion": "--criterion", "calibration": "--calibration", "targets": "--targets",
    "family": "--family", "native": "--native",
}  # fmt: skip


def _refuse_numbers(pack: str) -> None:
    """Refuse options whose numbers stand in the pack, wherever they are given."""
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    for name, flag in _DECIDED.items():
        if context.get_parameter_source(name) not in (None, default):
            raise OptionError(f"{flag}: {pack} has decided that already", f"Leave {flag} or --pack out.")


PushOne = Callable[[PushRequest, Baked], Result]


def _show_one(
    outcome: Baked | Failure, seconds: float, pushing: PushRequest | None, push_one: PushOne | None
) -> Result:
    """Push a single export, if it is to be, and describe both."""
    if isinstance(outcome, Failure):
        raise outcome.error
    done = export_text.done(outcome, seconds)
    return done.followed_by(push_one(pushing, outcome), "push") if pushing and push_one else done


def _push_all(
    out: Output, outcomes: Sequence[Baked | Failure], pushing: PushRequest | None, push_one: PushOne | None
) -> list[Result | CrdiffError | None]:
    """Push each of several exports; one that fails does not stop the others. The tag is set if none does."""
    pushes: list[Result | CrdiffError | None] = []
    complete = True
    for number, outcome in enumerate(outcomes, 1):
        push: Result | CrdiffError | None = None
        try:
            if isinstance(outcome, Failure):
                raise outcome.error
            if pushing and push_one:
                is_last = number == len(outcomes)
                push = push_one(pushing if is_last and complete else replace(pushing, tag=None), outcome)
        except CrdiffError as error:
            complete = False
            out.error(error)
            push = None if isinstance(outcome, Failure) else error
        pushes.append(push)
    return pushes


def _outputs(output: Path | None, sizes: Sequence[Size]) -> list[Path | None]:
    """Name the output of every size; OptionError where several would have one name."""
    different = list(dict.fromkeys(sizes))
    if output is None:
        return [None] * len(different)
    if "{size}" not in str(output):
        if len(different) > 1 and not output.is_dir():
            raise OptionError(
                f"-o {output}: {len(different)} sizes need a name each",
                "Write {size} in it, as in -o 'sdxl-{size}.safetensors', or give a folder.",
            )
        return [output] * len(different)
    return [Path(str(output).replace("{size}", str(size))) for size in different]


def _each(jobs: Sequence[ExportJob], notes: Sequence[Sequence[str]]) -> list[str]:
    """List the notes of all exports, each once; of several exports they name the size that they are about."""
    if len(jobs) == 1:
        return list(notes[0])
    sizes: dict[str, list[str]] = {}
    for job, some in zip(jobs, notes, strict=True):
        for note in some:
            sizes.setdefault(note, []).append(str(job.plan.size))
    return [note if len(about) == len(jobs) else f"{', '.join(about)}: {note}" for note, about in sizes.items()]


def _push(
    out: Output, previews: Sequence[str], destination: Destination, family: Path | None, pushing: PushRequest,
    baked: Baked,
) -> Result:  # fmt: skip
    path = baked.written.path
    request = baked.job.request
    with sheet.with_sheet(out, pushing, previews, path, request.base, family, request.variant) as complete:
        return push_result(*transfer(out, complete, path, destination, checked=True))


def _prepare_thumbnail(job: ExportJob, prompt: str) -> "DrawingSetup":
    from crdiff_export.evaluate.preview import thumbnail

    return thumbnail.prepare(job, prompt)


def _with_thumbnail(out: Output, job: ExportJob, setup: "DrawingSetup", prompt: str) -> ExportJob:
    """Draw the picture that the header will have."""
    from crdiff_export.evaluate.preview import thumbnail

    with out.progress() as display, out.stopper.watch(display) as progress:
        picture = thumbnail.draw(job, setup, prompt, progress)
    return replace(job, request=replace(job.request, thumbnail=picture))


def _push_request(repo: str | None, push: PushRequest, previews: tuple[str, ...]) -> PushRequest | None:
    """Complete and check the request of a push; None for an export alone, which takes no options of a push."""
    if repo is not None:
        request = replace(push, repo=repo)
        check_request(request)
        sheet.check(request, previews)
        return request
    unset, context = PushRequest(""), click.get_current_context()
    values = {field.name: getattr(push, field.name) for field in fields(push)} | {"previews": previews}
    for name, value in values.items():
        # A variable of the environment is for those runs that push.
        is_typed = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if is_typed and value != getattr(unset, name, ()):
            flags = {"path": "path-in-repo", "private": "private/--public", "previews": "preview"}
            flag = flags.get(name, name.replace("_", "-"))
            raise OptionError(f"--{flag} is for a push", "Give --push ORG/NAME, too, or leave it out.")
    return None


def _destination(pushing: PushRequest, request: ExportRequest) -> Destination:
    """Check where the file will go before its base is fetched."""
    from crdiff_export.hub import bases

    source = bases.hub_uri(request.base) or request.base
    name = request.output.name if request.output else f"{Path(request.base).stem}-crdiff-{request.size}"
    return check_destination(pushing, source, name)
