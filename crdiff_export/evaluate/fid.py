"""FID: how far a model's pictures are, as a set, from those of a reference. It is told, and nothing follows from it.

One number for a whole set has no picture to be paired with, is too large for small sets, and by an amount that depends
on the model: so there is no interval, and no verdict.
"""

import hashlib
import io
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from crdiff_export.errors import OptionError
from crdiff_export.evaluate.frechet import Moments, Reference
from crdiff_export.evaluate.scorers import inception
from crdiff_export.formats.text import printable
from crdiff_export.progress import Progress
from crdiff_export.sizes import Size

if TYPE_CHECKING:
    from PIL.Image import Image

DENSE: Final = "dense"
# src: `samples_find_ext` of torch-fidelity; as there, folders in a folder are not looked into.
KINDS: Final = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True, slots=True)
class Against:
    """What FID is to be taken against: the `files` of a folder, or with none what the dense model draws at its size.

    `name` is fit for others to read: of a folder's path only the last part. `weights` is the network's file, where it
    is not to come from the cache.
    """

    name: str
    files: tuple[Path, ...]
    pictures: int
    weights: Path | None = None

    @property
    def drawn(self) -> bool:
        """Whether the reference has to be drawn."""
        return not self.files

    def fact(self, native: Size) -> str:
        """What the number is, for people."""
        own = f"of the dense model at {native}, of the same prompts from other noise"
        whose = own if self.drawn else f"in {printable(self.name)}"
        return f"against {self.pictures} pictures {whose}, by {inception.NAME}; 0 for sets that are alike"

    def notes(self, pictures: int) -> Iterator[str]:
        """What to know before the number is believed."""
        if (fewest := min(pictures, self.pictures)) < inception.FEATURES:
            yield (
                f"FID of {fewest} pictures: of less than {inception.FEATURES}, the number of features, a covariance is "
                f"not of full rank, and an FID is too large by an amount that depends on the model as well (Heusel et "
                f"al. 2017, Chong and Forsyth 2020); do not set it beside an FID of another number of pictures"
            )
        if any(path.suffix.lower() != ".png" for path in self.files):
            yield "FID: some of the reference are JPEG files, and what that leaves in a picture counts as well"


def choose(asked: str | None, weights: Path | None, pictures: int) -> Against | None:
    """What was asked for, if anything; a CrdiffError where it is not there, or too little for a covariance."""
    if asked is None:
        if weights:
            raise OptionError("--fid-weights without --fid", "Say what to take the FID against, or leave it out.")
        return None
    inception.check(weights)
    folder = None if asked == DENSE else Path(asked).expanduser()
    files = _listed(folder) if folder else ()
    found = Against(folder.resolve().name if folder else DENSE, files, len(files) if folder else pictures, weights)
    if min(pictures, found.pictures) < 2:
        raise OptionError("FID of a single picture, which has no covariance", "It takes some thousands of either set.")
    return found


class Meter:
    """Takes the FID of one set of pictures after the other against the same reference."""

    def __init__(self, asked: Against, network: inception.Inception) -> None:
        self.asked = asked
        self._network = network
        self._reference: Reference | None = None
        self._hash: str | None = None

    def start(self) -> Moments:
        """Of a set that nothing is in yet."""
        return Moments(inception.FEATURES)

    def see(self, moments: Moments, images: "Iterable[Image]") -> None:
        """Some more pictures of a set."""
        for rows in self._network.features(images):
            moments.add(rows)

    def refer(self, moments: Moments) -> None:
        """From here on this is the reference."""
        self._reference = Reference.of(moments)

    def read(self, progress: Progress) -> None:
        """Take the folder's pictures for the reference; OptionError for a damaged one."""
        progress.stage("reference", len(self.asked.files), "pictures")
        digest, moments = hashlib.sha256(), self.start()

        def pictures() -> "Iterator[Image]":
            for path in self.asked.files:
                image, data_hash = _opened(path)
                digest.update(data_hash)
                yield image
                progress.advance(1)

        self.see(moments, pictures())
        self._hash = digest.hexdigest()
        self.refer(moments)

    def distance(self, moments: Moments) -> float:
        """The FID of a set."""
        assert self._reference
        return self._reference.distance(moments)

    def record(self, pictures: int) -> dict[str, Any]:
        """What the numbers are of, for a program."""
        return {
            "reference": self.asked.name, "reference_pictures": self.asked.pictures, "reference_sha256": self._hash,
            "pictures": pictures, "features": self._network.fingerprint(),
        }  # fmt: skip


def opened(asked: Against | None, device: str, progress: Progress) -> Meter | None:
    """A meter with its network and, if that is a folder, its reference; None where there is nothing to take."""
    if asked is None:
        return None
    meter = Meter(asked, inception.load(device, asked.weights))
    if not asked.drawn:
        meter.read(progress)
    return meter


def _listed(folder: Path) -> tuple[Path, ...]:
    try:
        found = tuple(sorted(path for path in folder.iterdir() if path.suffix.lower() in KINDS and path.is_file()))
    except OSError as error:
        raise OptionError(
            f"{folder}: {error.strerror}", "Give --fid a folder of PNG or JPEG pictures, or the word dense."
        ) from error
    if not found:
        raise OptionError(f"{folder}: has no picture", f"FID takes what ends in {', '.join(KINDS)}.")
    return found


def _opened(path: Path) -> "tuple[Image, bytes]":
    """A picture in RGB, and the hash of its file."""
    from PIL import Image

    try:
        data = path.read_bytes()
        with warnings.catch_warnings(action="ignore"):  # of a picture that is very large, or has odd metadata
            image = Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OptionError(
            f"{path}: cannot be read as a picture: {printable(str(error))}", "Mend it, or take it out of the folder."
        ) from error
    return image, hashlib.sha256(data).digest()
