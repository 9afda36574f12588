"""How diffusers opens a base, decided from names and shapes alone, and the source of the parts that it lacks."""

import inspect
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal

from crdiff_export.errors import HubError, OptionError, PreviewError
from crdiff_export.formats.checkpoint import MODEL_INDEX, Checkpoint
from crdiff_export.formats.safetensors import show
from crdiff_export.formats.strict_json import MalformedError, parse_object
from crdiff_export.hub import bases
from crdiff_export.hub.bases import Base
from crdiff_export.models import demo
from crdiff_export.models.families import Match, pipelines
from crdiff_export.models.families.model import BUNDLED, Pipeline
from crdiff_export.models.prediction import Prediction
from crdiff_export.prune.architecture import Architecture
from crdiff_export.sampling.quiet import quiet_libraries
from crdiff_export.sizes import Size

# A file of the original layout with these tensors holds the whole model.
_VAE = "first_stage_model."
# The sizes that SDXL's pipelines are told, as (height, width).
TOLD_SIZES: Final = frozenset({"original_size", "target_size"})
# diffusers imports the libraries that model_index.json names, so others are refused.
_LIBRARIES = {None, "diffusers", "transformers", "stable_diffusion"}


@dataclass(frozen=True, slots=True)
class Opening:
    """How diffusers opens a base.

    Attributes:
        kind: `folder`: a complete pipeline; `file`: a whole model without its configuration; `network`: the UNet or
            transformer alone.
        path: The base.
        pipeline: diffusers' classes for its family.
        config: The folder with all that `path` lacks, or a repository on the Hub as hf://….
        prefix: The prefix of the network's tensors in a file.
        original: Whether a file has the original layout.
        variant: The variant of a folder's weights.
        prediction: What a file's own marks say that it predicts; a folder has its own scheduler.
    """

    kind: Literal["folder", "file", "network"]
    path: Path
    pipeline: Pipeline
    config: Path | str
    prefix: str = ""
    original: bool = True
    variant: str | None = None
    prediction: Prediction | None = None

    @property
    def remote(self) -> str | None:
        """The repository that parts come from, unless the local cache has them."""
        return self.config if isinstance(self.config, str) else None

    def config_folder(self) -> Path:
        """Return the folder of the configuration, downloaded if necessary.

        Raises:
            HubError: The download failed.

        """
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
    """Check that the libraries are installed that only pictures need.

    Args:
        offload: Whether parts of the pipeline are to wait in main memory, which needs `accelerate`.

    Raises:
        PreviewError: A library is missing.

    """
    for name in ("diffusers", "transformers", "PIL", *(("accelerate",) if offload else ())):
        if find_spec(name) is None:
            package = {"PIL": "Pillow"}.get(name, name)
            raise PreviewError(f"{package} is not installed, which pictures need", f"`pip install {package}`.")


def choose(
    base: Base, checkpoint: Checkpoint, match: Match, model: Architecture, *, config: str | None, variant: str | None
) -> Opening:
    """Decide how diffusers opens a base.

    Args:
        base: The base.
        checkpoint: Its headers.
        match: Its family, layout and prefix.
        model: Its architecture.
        config: The user's `--config`, if any.
        variant: The user's `--variant`, if any.

    Returns:
        The way to open it.

    Raises:
        PreviewError: diffusers cannot draw with it from a prompt alone.
        OptionError: `config` was given for a folder.

    """
    if checkpoint.kind == "folder" and config:
        raise OptionError(f"{base.name}: a folder has its own configuration", "Leave --config out.")
    folder = checkpoint.path if checkpoint.kind == "folder" else Path(config).expanduser() if config else None
    pipeline = _pipeline(base.name, match, model, folder)
    if checkpoint.kind == "folder":
        _check_folder(checkpoint.path, base.name)
        return Opening("folder", checkpoint.path, pipeline, checkpoint.path, variant=variant)
    if checkpoint.kind == "shards" or checkpoint.path.suffix.lower() != ".safetensors":
        problem = "in shards" if checkpoint.kind == "shards" else "not a safetensors file"
        hint = "Give the model's folder for diffusers, or one safetensors file of it."
        raise PreviewError(f"{base.name}: is {problem}, which cannot be drawn with as it is", hint)
    if pipeline.network in pipelines.FOLDERS_ONLY:
        hint = "Give its folder for diffusers."
        raise PreviewError(f"{base.name}: diffusers opens a {pipeline.network} from a folder only", hint)
    original = match.layout.name == "original"
    whole = original and match.prefix == BUNDLED and any(name.startswith(_VAE) for name in checkpoint.shapes)
    kind: Literal["file", "network"] = "file" if whole and pipeline.folder == "unet" else "network"
    parts = _config(config) if config else _usual_config(pipeline)
    if isinstance(parts, Path):
        _check_folder(parts, str(parts))
    return Opening(kind, checkpoint.path, pipeline, parts, match.prefix, original, prediction=model.prediction)


def _pipeline(name: str, match: Match, model: Architecture, folder: Path | None) -> Pipeline:
    """Choose the pipeline of a family; for a UNet whose table names none, the one that its folder names."""
    family, special = match.family, model.special
    if family.table and family.scope == "group" and not family.pipelines and not special:
        return _pipeline_of(folder, name)
    if not special and model.prediction and model.prediction.kind == "edm":
        special = "edm"
    pipeline = family.pipelines.get(special)
    if pipeline is None and special == "edm":
        raise PreviewError(
            f"{name}: marked as EDM, which no configuration of {family.title} is known for",
            "Give the model's folder for diffusers, with its own scheduler.",
        )
    if pipeline is None or pipeline.pictures:
        raise PreviewError(
            f"{name}: {match.title}: no picture can be drawn with it from a prompt alone here",
            "Take its text-to-image sibling, or give its table a [pipeline] (`crdiff docs families`).",
        )
    return pipeline


def _pipeline_of(folder: Path | None, name: str) -> Pipeline:
    hint = "Give the model's folder for diffusers as the base, or with --config, if it draws from a prompt alone."
    if folder is None or not folder.is_dir():
        raise PreviewError(f"{name}: a UNet of no known family, for which only its folder names a pipeline", hint)
    _check_folder(folder, name)
    index = folder / MODEL_INDEX
    class_name = parse_object(index.read_bytes(), fractions=True).get("_class_name")
    if class_name not in pipelines.from_prompts():
        message = f"{index}: no picture can be drawn with {show(str(class_name))} from a prompt alone here"
        raise PreviewError(message, hint)
    return Pipeline(str(class_name), "")


def _usual_config(pipeline: Pipeline) -> Path | str:
    return demo.config(pipeline.config) if pipeline.config in bases.BUILT_IN else f"hf://{pipeline.config}"


def _config(text: str) -> Path | str:
    """Read `--config`: a folder, or a repository on the Hub as hf://ORG/NAME."""
    path = Path(text).expanduser()
    if path.exists():
        return path
    location = bases.hub_location(text)
    if location is None or location.file:
        raise PreviewError(f"{text}: no folder, and no repository on the Hub", "Give --config FOLDER, or ORG/NAME.")
    return str(location)


def _check_folder(folder: Path, name: str) -> None:
    """Refuse folders without a pipeline, and pipelines with parts of other libraries."""
    index = folder / MODEL_INDEX
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


def tell(opening: Opening, size: Size) -> Opening:
    """Tell a model that is conditioned on sizes another size than the one drawn; this imports diffusers.

    SDXL's paper (arXiv 2307.01952, section 2.2) conditions on the original and on the target size.

    Args:
        opening: How diffusers opens the base.
        size: The size to tell.

    Returns:
        The opening, whose pipeline gets the size with every call.

    Raises:
        OptionError: The pipeline takes no such sizes.
    """
    pipeline = opening.pipeline
    if not call_arguments(pipeline.pipeline) >= TOLD_SIZES:
        raise OptionError(f"--told-size: {pipeline.pipeline} is not told a size", "It is for SDXL; leave it out.")
    told = dict.fromkeys(TOLD_SIZES, (size.height, size.width))
    return replace(opening, pipeline=replace(pipeline, arguments={**pipeline.arguments, **told}))


def told_size(pipeline: Pipeline) -> Size | None:
    """Return the size that `tell` has put in place of the size drawn; None without one."""
    match pipeline.arguments.get("target_size"):
        case [int(height), int(width)]:
            return Size(width, height)
    return None


def call_arguments(pipeline: str) -> frozenset[str]:
    """Return the names of the arguments that a pipeline's call takes; this imports diffusers.

    Args:
        pipeline: The name of its class.

    Returns:
        The names.
    """
    import diffusers

    with quiet_libraries("diffusers", "transformers"):  # the class is loaded at its first use, with remarks
        pipeline_class = getattr(diffusers, pipeline)
    return frozenset(inspect.signature(pipeline_class.__call__).parameters)
