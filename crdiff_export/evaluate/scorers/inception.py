"""The features that an FID is computed from: 2048 numbers of each picture, by torch-fidelity's `inception-v3-compat`.

It is the network of the TensorFlow original in torch-fidelity's own code, with that original's scaling of a picture to
299x299, which is bilinear and smooths nothing beforehand. src: torch_fidelity/feature_extractor_inceptionv3.py (0.4.0).
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from crdiff_export.errors import ScorerError
from crdiff_export.evaluate.scorers import weights
from crdiff_export.formats.hashing import hash_file
from crdiff_export.progress import Silent

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    Rows = NDArray[np.float64]

PACKAGE: Final = "torch_fidelity"
NAME: Final = "inception-v3-compat"
FEATURES: Final = 2048
# src: the file at torch-fidelity's URL_INCEPTION_V3, whose name has the first eight digits of this hash.
SHA256: Final = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
# Our choice: pictures in one batch, and their pixels; the network scales each pixel as several floats.
BATCH: Final = 32
PIXELS: Final = 1 << 22
_BY_HAND: Final = "Run this where there is a connection, or give the file (91 MiB) with --fid-weights."


class Inception:
    """The network on a device, in fp32."""

    def __init__(self, network: Any, device: str) -> None:
        self._network = network
        self._device = device

    def features(self, images: "Iterable[Image]") -> "Iterator[Rows]":
        """Compute the features of pictures; no picture is kept.

        Args:
            images: Pictures of any size and mode.

        Yields:
            Parts of the features [picture, 2048] in float64, in the pictures' order.

        Raises:
            ScorerError: A feature is not finite.
        """
        import numpy as np
        import torch

        for batch in _batches(images):
            pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in batch]))
            with torch.inference_mode():
                (features,) = self._network(pixels.permute(0, 3, 1, 2).to(self._device))
            rows = features.cpu().double().numpy()
            if not np.isfinite(rows).all():
                raise ScorerError("FID: a feature of a picture is no finite number", "Try --scorer-device cpu.")
            yield rows

    def fingerprint(self) -> dict[str, str]:
        """Return what the features depend on, beside the pictures."""
        return {
            "network": NAME, "weights": f"sha256:{SHA256}", "torch-fidelity": version("torch-fidelity"),
            "device": self._device.partition(":")[0], "dtype": "fp32", "torch": version("torch"),
        }  # fmt: skip


def check(file: Path | None) -> None:
    """Check that the package is installed and the file is there, before anything is opened.

    Raises:
        ScorerError: One of them is missing.
    """
    if find_spec(PACKAGE) is None:
        raise ScorerError("torch-fidelity is not installed, which FID needs", "`python -m pip install torch-fidelity`.")
    if file and not file.is_file():
        raise ScorerError(f"{file}: there is no such file", f"Give --fid-weights the file of {_url()}.")


def absent() -> str | None:
    """Return where the weights would be fetched from; None if they are in torch's cache."""
    return None if _cache_path().is_file() else _url()


def load(device: str, file: Path | None = None) -> Inception:
    """Open the network with its published weights.

    Their hash is checked before anything is read from them: torch-fidelity unpickles whatever it is given.

    Args:
        device: The device, as torch names it.
        file: The weights; None takes them from torch's cache, into which they are fetched as torch-fidelity does.

    Returns:
        The network.

    Raises:
        ScorerError: The weights cannot be fetched or are not the published ones, or torch-fidelity is missing.
    """
    place, _ = weights.place(device, "fp32")
    path = file or _fetch()
    try:
        digest = hash_file(path, Silent())
    except OSError as error:
        raise ScorerError(f"{path}: {error.strerror}", f"Give --fid-weights the file of {_url()}.") from error
    if digest != SHA256:
        hint = f"Delete it and run this again; it has to be the file of {_url()}."
        raise ScorerError(f"{path}: not the published weights of {NAME}", hint)
    network = _module().FeatureExtractorInceptionV3(NAME, [str(FEATURES)], feature_extractor_weights_path=str(path))
    return Inception(network.to(place), device)


def _fetch() -> Path:
    """Return the weights in torch's cache, where every program with torch-fidelity looks for them."""
    import torch

    path = _cache_path()
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(_url(), str(path), SHA256, progress=False)
    except OSError as error:  # urllib's errors, too
        reason = getattr(error, "reason", None) or error.strerror or error
        raise ScorerError(f"{_url()}: cannot be fetched: {reason}", _BY_HAND) from error
    except RuntimeError as error:
        if "invalid hash" not in str(error):
            raise
        raise ScorerError(f"{_url()}: is not the file that it was", _BY_HAND) from error
    return path


def _cache_path() -> Path:
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints" / _url().rpartition("/")[2]


def _url() -> str:
    return str(_module().URL_INCEPTION_V3)


def _module() -> Any:
    """Import the module of the network; ScorerError where that fails."""
    try:
        with _without_other_networks():
            from torch_fidelity import feature_extractor_inceptionv3
    except (ImportError, RuntimeError) as error:  # a torchvision for another torch raises RuntimeError
        message = f"torch-fidelity cannot be imported: {str(error).splitlines()[0]}"
        raise ScorerError(message, "Install torch-fidelity 0.4 and torch, of versions that go together.") from error
    return feature_extractor_inceptionv3


@contextmanager
def _without_other_networks() -> Iterator[None]:
    """Let a module of torch-fidelity be imported without the package's `__init__`, which imports all of its networks.

    Some networks need torchvision, which works with one build of torch alone; the Inception does not need it.
    Afterwards nothing of the package is left in `sys.modules`.
    """
    if PACKAGE in sys.modules:
        yield
        return
    spec = find_spec(PACKAGE)
    assert spec
    sys.modules[PACKAGE] = module_from_spec(spec)  # a module that is not executed
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]


def _batches(images: "Iterable[Image]") -> "Iterator[list[Image]]":
    """Yield neighbours of one size, as many as fit in memory when they are scaled."""
    for (width, height), neighbours in groupby(images, lambda image: image.size):
        while batch := list(islice(neighbours, max(1, min(BATCH, PIXELS // (width * height))))):
            yield batch
