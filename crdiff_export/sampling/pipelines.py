"""How a base becomes a pipeline of diffusers, decided from names alone, and where what it lacks comes from."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from crdiff_export.errors import HubError, OptionError, PreviewError
from crdiff_export.formats.checkpoint import Checkpoint
from crdiff_export.formats.safetensors import show
from crdiff_export.formats.strict_json import MalformedError, parse_object
from crdiff_export.hub import bases
from crdiff_export.hub.bases import Base
from crdiff_export.models import demo
from crdiff_export.models.families import Match, pipelines
from crdiff_export.models.families.pipelines import BUNDLED, Pipeline
from crdiff_export.sizes import Size

# What a file has that holds a whole model in the original layout.
_VAE = "first_stage_model."
# diffusers imports what this file names; nothing else is ever asked for.
_LIBRARIES = {None, "diffusers", "transformers", "stable_diffusion"}


@dataclass(frozen=True, slots=True)
class Opening:
    """A base and what its pipeline is made of.

    A `folder` is a pipeline with everything; a `file` holds the whole model but its configuration, which is at
    `config`; a `network` is the UNet or transformer alone, and everything else is at `config`: a folder, or a place on
    the Hub as hf://….
    """

    kind: Literal["folder", "file", "network"]
    path: Path
    pipeline: Pipeline
    config: Path | str
    prefix: str = ""
    original: bool = True
    variant: str | None = None

    @property
    def remote(self) -> str | None:
        """What comes from the Hub, or from its cache."""
        return self.config if isinstance(self.config, str) else None

    def here(self) -> Path:
        """The folder of the configuration, fetched if it has to be; HubError where that fails."""
        if isinstance(self.config, Path):
            return self.config
        from crdiff_export import hub

        location = bases.hub_location(self.config)
        assert location
        try:
            return hub.fetch_parts(location, self.pipeline.folder if self.kind == "network" else None)
        except HubError as error:
            hint = "Or give it with --config: a folder for diffusers that has this model's model_index.json."
            raise HubError(f"the configuration of {self.path.name}: {error.message}", f"{error.hint} {hint}") from error


def check_packages(*, offload: bool) -> None:
    """PreviewError where something that only pictures need is not installed."""
    for name in ("diffusers", "transformers", "PIL", *(("accelerate",) if offload else ())):
        if find_spec(name) is None:
            package = {"PIL": "Pillow"}.get(name, name)
            raise PreviewError(f"{package} is not installed, which pictures need", f"`pip install {package}`.")


def choose(
    base: Base, checkpoint: Checkpoint, match: Match, native: Size, *, config: str | None, variant: str | None
) -> Opening:
    """The way to open a base; PreviewError or OptionError where there is none."""
    found = _pipeline(base.name, match, native)
    if checkpoint.kind == "folder":
        _check_folder(checkpoint.path, base.name)
        if config:
            raise OptionError(f"{base.name}: a folder has its own configuration", "Leave --config out.")
        return Opening("folder", checkpoint.path, found, checkpoint.path, variant=variant)
    if checkpoint.kind == "shards" or checkpoint.path.suffix.lower() != ".safetensors":
        what = "in shards" if checkpoint.kind == "shards" else "not a safetensors file"
        hint = "Give the model's folder for diffusers, or one safetensors file of it."
        raise PreviewError(f"{base.name}: is {what}, which cannot be drawn with as it is", hint)
    original = match.layout.name == "original"
    whole = original and match.prefix == BUNDLED and any(name.startswith(_VAE) for name in checkpoint.shapes)
    kind: Literal["file", "network"] = "file" if whole and found.folder == "unet" else "network"
    at = _config(config) if config else demo.config() if match.family.id == "demo" else f"hf://{found.config}"
    if isinstance(at, Path):
        _check_folder(at, str(at))
    return Opening(kind, checkpoint.path, found, at, match.prefix, original)


def _pipeline(name: str, match: Match, native: Size) -> Pipeline:
    family = match.family
    base = family.twin is not None and native == Size(*family.twin.native)
    special = "inpainting" if match.inpainting else "base" if base else ""
    # The demo model is an SD1 in all but its size.
    found = pipelines.find("sd15" if family.id == "demo" else family.id, special)
    if found is None or found.pictures:
        what = f"{family.title}, inpainting," if match.inpainting else family.title
        raise PreviewError(
            f"{name}: {what} makes pictures from pictures, not from a prompt alone",
            "Take its text-to-image sibling; `crdiff export` takes this one.",
        )
    return found


def _config(text: str) -> Path | str:
    """What --config names: a folder, or a repository on the Hub."""
    path = Path(text).expanduser()
    if path.exists():
        return path
    location = bases.hub_location(text)
    if location is None or location.file:
        raise PreviewError(f"{text}: no folder, and no repository on the Hub", "Give --config FOLDER, or ORG/NAME.")
    return str(location)


def _check_folder(folder: Path, name: str) -> None:
    """Refuse what is no pipeline's folder, and one whose pipeline is made of more than diffusers and transformers."""
    index = folder / "model_index.json"
    try:
        parts = parse_object(index.read_bytes(), fractions=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PreviewError(
            f"{name}: not the folder of a pipeline: it has no model_index.json",
            "Give the folder that diffusers' save_pretrained writes, with all of its parts.",
        ) from error
    except OSError as error:
        raise PreviewError(f"{index}: {error.strerror}", "Give a folder that you can read.") from error
    except MalformedError as error:
        raise PreviewError(f"{index}: {error}", "Download or save the folder again.") from error
    for part, value in parts.items():
        if isinstance(value, list) and value and value[0] not in _LIBRARIES:
            raise PreviewError(
                f"{index}: {show(part)} is of the library {show(str(value[0]))}, which is not imported",
                "Give the folder of a plain text-to-image pipeline.",
            )
