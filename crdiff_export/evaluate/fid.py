"""FID: how far a model's pictures are, as a set, from those of a reference. It is shown, and nothing follows from it.

FID is one number for a whole set. It has no picture to be paired with, and for small sets it is too large by an amount
that depends on the model; so there is no interval and no verdict.
"""

import hashlib
import io
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from crdiff_export.errors import OptionError
from crdiff_export.evaluate.frechet import Moments
from crdiff_export.evaluate.scorers import inception
from crdiff_export.formats.text import printable
from crdiff_export.progress import Progress
from crdiff_export.sizes import Size

if TYPE_CHECKING:
    from PIL.Image import Image

DENSE_REFERENCE: Final = "dense"
# src: `samples_find_ext` of torch-fidelity, which does not look into folders inside the folder, either.
SUFFIXES: Final = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True, slots=True)
class FidReference:
    """What an FID is taken against: the `files` of a folder, or without files what the dense model draws.

    `name` may be published: of a folder's path it has only the last part. `weights` is the file of the network, where
    it is not to come from the cache.
    """

    name: str
    files: tuple[Path, ...]
    pictures: int
    weights: Path | None = None

    @property
    def is_drawn(self) -> bool:
        """Whether the dense model has to draw the reference."""
        return not self.files

    def describe(self, native: Size) -> str:
        """Say what the number means."""
        drawn = f"of the dense model at {native}, of the same prompts from other noise"
        where = drawn if self.is_drawn else f"in {printable(self.name)}"
        return f"against {self.pictures} pictures {where}, by {inception.NAME}; 0 for sets that are alike"

    def notes(self, pictures: int) -> Iterator[str]:
        """Yield what to know before one believes the FID of a set of `pictures`."""
        if (fewest := min(pictures, self.pictures)) < inception.FEATURES:
            yield (
                f"FID of {fewest} pictures: of less than {inception.FEATURES}, the number of features, a covariance is "
                f"not of full rank, and an FID is too large by an amount that depends on the model as well (Heusel et "
                f"al. 2017, Chong and Forsyth 2020); do not set it beside an FID of another number of pictures"
            )
        if any(path.suffix.lower() != ".png" for path in self.files):
            yield "FID: some of the reference are JPEG files, and what that leaves in a picture counts as well"


def choose(source: str | None, weights: Path | None, pictures: int) -> FidReference | None:
    """Choose the reference.

    Args:
        source: A folder of pictures, "dense", or None for no FID.
        weights: The file of the network; None takes it from torch's cache.
        pictures: How many pictures each model draws.

    Returns:
        The reference, or None for no FID.

    Raises:
        OptionError: There is no such folder, or there are too few pictures for a covariance.
        ScorerError: torch-fidelity or the file of the network is missing.
    """
    if source is None:
        if weights:
            raise OptionError("--fid-weights without --fid", "Say what to take the FID against, or leave it out.")
        return None
    inception.check(weights)
    if source == DENSE_REFERENCE:
        reference = FidReference(DENSE_REFERENCE, (), pictures, weights)
    else:
        folder = Path(source).expanduser()
        files = _picture_files(folder)
        reference = FidReference(folder.resolve().name, files, len(files), weights)
    if min(pictures, reference.pictures) < 2:
        raise OptionError("FID of a single picture, which has no covariance", "It takes some thousands of either set.")
    return reference


class FidMeter:
    """Measures one set of pictures after the other by the same network.

    `reference` are the moments of the reference; the FID of another set is its distance from them.
    """

    def __init__(self, reference: FidReference, network: inception.Inception) -> None:
        self._reference = reference
        self._network = network
        self.reference = Moments()
        self._hash: str | None = None

    def add(self, moments: Moments, images: "Iterable[Image]") -> None:
        """Add pictures to a set."""
        for rows in self._network.features(images):
            moments.add(rows)

    def read_reference(self, progress: Progress) -> None:
        """Take the folder's pictures as the reference; OptionError for a damaged one."""
        files = self._reference.files
        progress.stage("reference", len(files), "pictures")
        digest = hashlib.sha256()

        def images() -> "Iterator[Image]":
            for path in files:
                image, file_hash = _read(path)
                digest.update(file_hash)
                yield image
                progress.advance(1)

        self.add(self.reference, images())
        self._hash = digest.hexdigest()

    def record(self, pictures: int) -> dict[str, Any]:
        """Return what the numbers depend on, for JSON."""
        return {
            "reference": self._reference.name, "reference_pictures": self._reference.pictures,
            "reference_sha256": self._hash, "pictures": pictures, "features": self._network.fingerprint(),
        }  # fmt: skip


def open_meter(reference: FidReference | None, device: str, progress: Progress) -> FidMeter | None:
    """Open the network and, if the reference is a folder, read it.

    Args:
        reference: The reference that was chosen.
        device: The device of the network, as torch names it.
        progress: Is told how many pictures of a folder have been read.

    Returns:
        The meter, or None where no FID is wanted.

    Raises:
        CrdiffError: The network or a picture cannot be opened.
    """
    if reference is None:
        return None
    meter = FidMeter(reference, inception.load(device, reference.weights))
    if not reference.is_drawn:
        meter.read_reference(progress)
    return meter


def _picture_files(folder: Path) -> tuple[Path, ...]:
    try:
        files = tuple(sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()))
    except OSError as error:
        hint = "Give --fid a folder of PNG or JPEG pictures, or the word dense."
        raise OptionError(f"{folder}: {error.strerror}", hint) from error
    if not files:
        raise OptionError(f"{folder}: has no picture", f"FID takes what ends in {', '.join(SUFFIXES)}.")
    return files


def _read(path: Path) -> "tuple[Image, bytes]":
    """Read a picture as RGB, and the hash of its file."""
    from PIL import Image

    try:
        data = path.read_bytes()
        with warnings.catch_warnings(action="ignore"):  # about a very large picture, or odd metadata
            image = Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        message = f"{path}: cannot be read as a picture: {printable(str(error))}"
        raise OptionError(message, "Repair it, or remove it from the folder.") from error
    return image, hashlib.sha256(data).digest()
