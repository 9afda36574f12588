"""FID: the distance of two sets against what others compute, the network, and what an evaluation says of it."""

import io
import math
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray
from PIL import Image

from crdiff_export import Size
from crdiff_export.errors import ScorerError
from crdiff_export.evaluate import EvaluateRequest, Evaluation, evaluate, fid, files, page, report_text
from crdiff_export.evaluate.frechet import Moments
from crdiff_export.evaluate.scorers import inception
from crdiff_export.formats.hashing import hash_file
from crdiff_export.progress import Silent
from crdiff_export.sampling.session import Session
from tests.support.evaluating import Line, Steps, failing
from tests.support.messages import raises, refused
from tests.support.scoring import noise

Rows = NDArray[np.float64]
REQUEST = EvaluateRequest("demo", (Size(48, 48),), limit=4, ratio=0.4, steps=1, batch=3, fid="dense")

# A package in torch-fidelity's place: what belongs to its other networks cannot be imported, as without torchvision.
FAKE = {
    "__init__.py": "raise ImportError('torchvision')",
    "helpers.py": "SCALE = 1.0",
    "feature_extractor_inceptionv3.py": """
        from pathlib import Path

        import torch
        from torch_fidelity.helpers import SCALE

        URL_INCEPTION_V3 = "https://example.org/weights-6726825d.pth"

        class FeatureExtractorInceptionV3(torch.nn.Module):
            def __init__(self, name, features_list, feature_extractor_weights_path):
                super().__init__()
                assert name == "inception-v3-compat"
                (self.width,) = map(int, features_list)
                self.factor = float(Path(feature_extractor_weights_path).read_text())

            def forward(self, x):
                assert x.dtype == torch.uint8 and x.shape[1] == 3
                small = torch.nn.functional.adaptive_avg_pool2d(x.float(), 4).flatten(1)
                found = torch.zeros(len(x), self.width)
                found[:, :48] = small * self.factor * SCALE
                return (found,)
    """,
}


WIDTH = 64  # features of that network, the last 16 of them 0


def features(image: Image.Image, factor: float = 0.1) -> Rows:
    """What the fake network gives for a picture with sides that 4 divides."""
    pixels = np.asarray(image, np.float64)
    high, wide, _ = pixels.shape
    small = pixels.reshape(4, high // 4, 4, wide // 4, 3).mean((1, 3))
    return np.asarray(factor * small.transpose(2, 0, 1).ravel())


def oracle(one: Rows, other: Rows) -> float:
    """As pytorch-fid has it, by the root of a matrix; that may be singular, so rounding leaves something of a root."""
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second)
    apart = one.mean(0) - other.mean(0)
    return float(apart @ apart + np.trace(first + second) - 2 * np.trace(root).real)


def by_singular_values(one: Rows, other: Rows) -> float:
    """For few rows: with Cᵢ = XᵢᵀXᵢ / (nᵢ - 1) the trace of the root is the sum of the singular values of X₁X₂ᵀ."""
    first, second = (rows - rows.mean(0) for rows in (one, other))
    scale = math.sqrt((len(one) - 1) * (len(other) - 1))
    shared = np.linalg.svd(first @ second.T, compute_uv=False).sum() / scale
    spread = np.square(first).sum() / (len(one) - 1) + np.square(second).sum() / (len(other) - 1)
    return float(np.square(one.mean(0) - other.mean(0)).sum() + spread - 2 * shared)


def moments(rows: Rows, size: int = 7) -> Moments:
    made = Moments()
    for start in range(0, len(rows), size):
        made.add(rows[start : start + size])
    return made


def distance(one: Rows, other: Rows) -> float:
    return moments(one).distance(moments(other))


# --- the distance ---


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_moments_are_those_of_all_rows(size: int) -> None:
    rows = np.random.default_rng(0).normal(1e4, 1e-2, (100, 5))  # where the plain sums of squares lose it all
    parts = moments(rows, size)
    assert parts.count == 100
    np.testing.assert_allclose(parts.mean, rows.mean(0), rtol=1e-14)
    np.testing.assert_allclose(parts.covariance, np.cov(rows, rowvar=False), rtol=1e-7, atol=1e-12)


def test_of_one_number_it_is_a_formula() -> None:
    """(m₁ - m₂)² + (s₁ - s₂)²."""
    one, other = np.array([[1.0], [3.0], [5.0]]), np.array([[10.0], [14.0], [18.0]])
    assert distance(one, other) == pytest.approx((3 - 14) ** 2 + (2 - 4) ** 2)


@pytest.mark.parametrize(("width", "few", "many"), [(3, 50, 80), (20, 100, 41), (64, 500, 300)])
def test_it_is_that_of_a_matrix_root(width: int, few: int, many: int) -> None:
    rng = np.random.default_rng(width)
    one = rng.normal(0, 1, (few, width)) @ rng.normal(0, 1, (width, width))
    other = rng.normal(0.3, 1, (many, width)) @ rng.normal(0, 1, (width, width))
    assert distance(one, other) == pytest.approx(oracle(one, other), rel=1e-9)
    assert distance(other, one) == pytest.approx(distance(one, other), rel=1e-9)


@pytest.mark.parametrize(("few", "many"), [(2, 2), (5, 40), (40, 5), (2, 300)])
def test_of_fewer_rows_than_numbers_it_is_exact_as_well(few: int, many: int) -> None:
    rng = np.random.default_rng(few)
    one, other = rng.normal(0, 1, (few, 200)), rng.gamma(1, 1, (many, 200))
    assert distance(one, other) == pytest.approx(by_singular_values(one, other), rel=1e-7)


def test_a_set_is_at_no_distance_from_itself() -> None:
    for count in (2, 30, 500):
        rows = np.random.default_rng(count).gamma(0.4, 1, (count, 100))
        assert 0 <= distance(rows, rows[::-1]) < 1e-6
    same = np.ones((3, 4))
    assert distance(same, same) == 0
    assert distance(same, same + 1) == 4


# --- the network ---

URL = "https://example.org/weights-6726825d.pth"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torch-fidelity that is installed, though its other networks do not work."""
    site = tmp_path_factory.mktemp("site")
    (site / "torch_fidelity").mkdir()
    for name, text in FAKE.items():
        (site / "torch_fidelity" / name).write_text(textwrap.dedent(text))
    (site / "torch_fidelity-0.4.0.dist-info").mkdir()
    (site / "torch_fidelity-0.4.0.dist-info" / "METADATA").write_text("Name: torch-fidelity\nVersion: 0.4.0\n")
    return site


def install(site: Path, weights: Path, patch: pytest.MonkeyPatch) -> None:
    """Let that package be imported, and take a file for the published weights."""
    patch.syspath_prepend(site)
    patch.setattr(inception, "SHA256", hash_file(weights, Silent()))
    patch.setattr(inception, "FEATURES", WIDTH)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of that network."""
    path = tmp_path_factory.mktemp("published") / "weights.pth"
    path.write_text("0.1")
    return path


@pytest.fixture
def weights(tmp_path: Path, installed: Path, published: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The published weights, in a file, and an empty cache."""
    install(installed, published, monkeypatch)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return published


def pictures(count: int, width: int = 8, height: int = 12, seed: int = 0) -> list[Image.Image]:
    return noise([(width, height)] * count, seed)


def test_pictures_of_all_sizes_and_modes(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = inception.load("cpu", weights)
    images = [*pictures(40), *pictures(2, 16, 4), pictures(1)[0].convert("L"), *pictures(2)]
    parts = list(network.features(iter(images)))
    assert [len(rows) for rows in parts] == [32, 8, 2, 3]
    assert all(rows.dtype == np.float64 for rows in parts)
    expected = np.stack([features(image.convert("RGB")) for image in images])
    np.testing.assert_allclose(np.concatenate(parts)[:, :48], expected, rtol=1e-5)
    assert list(network.features([])) == []
    monkeypatch.setattr(inception, "PIXELS", 250)  # so that large ones come one by one
    assert [len(rows) for rows in network.features([*pictures(5), *pictures(2, 40, 40)])] == [2, 2, 1, 1, 1]


def test_a_feature_that_is_not_finite_is_refused(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "infinite.pth"
    path.write_text("inf")
    monkeypatch.setattr(inception, "SHA256", hash_file(path, Silent()))
    network = inception.load("cpu", path)
    with raises(ScorerError, "FID"):
        list(network.features(pictures(2)))


def test_nothing_else_of_the_package_is_imported_or_left(weights: Path) -> None:
    assert inception.load("cpu", weights).fingerprint() == {
        "network": "inception-v3-compat", "weights": f"sha256:{inception.SHA256}", "torch-fidelity": "0.4.0",
        "device": "cpu", "dtype": "fp32", "torch": version("torch"),
    }  # fmt: skip
    assert not [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]
    with pytest.raises(ImportError, match="torchvision"):
        __import__("torch_fidelity")


def test_a_package_that_somebody_has_imported_is_left_alone(
    weights: Path, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(installed, tmp_path / "own")
    (tmp_path / "own" / "torch_fidelity" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "own")
    for name in ("torch_fidelity", "torch_fidelity.helpers", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, name, None)  # so that all of them are gone afterwards
        del sys.modules[name]
    import torch_fidelity

    inception.load("cpu", weights)
    assert sys.modules["torch_fidelity"] is torch_fidelity


def test_a_package_that_is_broken(
    weights: Path, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(installed, tmp_path / "own")
    broken = "raise RuntimeError('operator nms does not exist\\nmore')"
    (tmp_path / "own" / "torch_fidelity" / "helpers.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path / "own")
    with raises(ScorerError, "torch-fidelity", "operator nms does not exist"):
        inception.load("cpu", weights)


def test_no_other_file_is_unpickled(weights: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    other.write_text("0.2")
    for path in (other, tmp_path / "no.pth"):
        with raises(ScorerError, path) as error:
            inception.load("cpu", path)
        assert URL in error.value.hint


def test_the_weights_are_fetched_once(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def download(url: str, target: str, prefix: str, *, progress: bool) -> None:
        fetched.append((url, prefix, progress))
        Path(target).write_bytes(weights.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert inception.absent() == URL
    for _ in range(2):
        inception.load("cpu")
    assert fetched == [(URL, inception.SHA256, False)]
    assert inception.absent() is None
    cached = tmp_path / "hub" / "checkpoints" / "weights-6726825d.pth"
    cached.write_text("half")
    with raises(ScorerError, cached):
        inception.load("cpu")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (URLError("no route"), "no route"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError('invalid hash value (expected "1", got "2")'), "is not the file"),
    ],
    ids=["offline", "full", "changed"],
)
def test_weights_that_cannot_be_fetched(
    weights: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    monkeypatch.setattr(torch.hub, "download_url_to_file", failing(error))
    with raises(ScorerError, URL, reason):
        inception.load("cpu")


# --- in an evaluation ---


def rows_of(images: Sequence[bytes]) -> Rows:
    return np.stack([features(Image.open(io.BytesIO(png))) for png in images])


@pytest.fixture(scope="module")
def against_dense(installed: Path, published: Path) -> Evaluation:
    """An evaluation with an FID against the dense model at its native size."""
    with pytest.MonkeyPatch.context() as patch:
        install(installed, published, patch)
        return evaluate(replace(REQUEST, fid_weights=published))


def test_against_the_dense_model(against_dense: Evaluation) -> None:
    """The same prompts from other noise: those that an evaluation from the next free seed on draws."""
    native = against_dense.job.drawing.native
    other = evaluate(replace(REQUEST, fid=None, sizes=(native,), ratio=0.0, seed=4, native=False))
    assert [model.subject.size for model in other.models] == [native]
    assert other.job.pairs == tuple((prompt, seed + 4) for prompt, seed in against_dense.job.pairs)
    reference = rows_of(other.models[0].images)
    assert [model.name for model in against_dense.models] == ["dense", "pruned", "POA 1.5"] * 2
    for model in against_dense.models:
        assert model.fid == pytest.approx(by_singular_values(rows_of(model.images), reference), rel=1e-5)
    assert all(model.fid for model in against_dense.models), "not even the dense model at that size is at 0"
    assert all(model.fid is None for model in other.models)
    assert other.fid is None


def test_against_a_folder(weights: Path, undrawn: None, tmp_path: Path) -> None:
    """A folder below, and files of other kinds, are not read; the path of the folder is not published."""
    folder = tmp_path / "somebody" / "pictures <b>"
    (folder / "deeper").mkdir(parents=True)
    images = [*pictures(5, 16, 8), *pictures(2, 24, 24, seed=1)]
    for number, image in enumerate(images):
        image.save(folder / f"{number}.{'PNG' if number % 2 else 'png'}")
    pictures(1)[0].save(folder / "deeper" / "unseen.png")
    (folder / "notes.txt").write_text("no picture")
    made = evaluate(replace(REQUEST, native=False, limit=2, fid=str(folder), fid_weights=weights))
    reference = np.stack([features(image) for image in images])
    for model in made.models:
        assert model.fid == pytest.approx(by_singular_values(rows_of(model.images), reference), rel=1e-5)
    assert made.fid
    assert {key: value for key, value in made.fid.items() if key not in ("features", "reference_sha256")} == {
        "reference": "pictures <b>", "reference_pictures": 7, "pictures": 2,
    }  # fmt: skip
    text = page.render(made) + repr(made.fid) + repr(made.facts)
    assert "somebody" not in text
    assert "7 pictures in pictures &lt;b&gt;, by" in text
    pictures(1, seed=9)[0].save(folder / "0.png")
    meter = fid.open_meter(fid.choose(str(folder), weights, 2), "cpu", Silent())
    assert meter
    assert meter.record(2)["reference_sha256"] != made.fid["reference_sha256"]


def test_few_pictures_are_pointed_out() -> None:
    reference = fid.FidReference("dense", (), 2048)
    assert list(reference.notes(2048)) == []
    (note,) = reference.notes(2047)
    assert note.startswith("FID of 2047 pictures: of less than 2048, the number of features,")
    (note,) = fid.FidReference("p", (Path("a.png"),), 100).notes(5000)
    assert note.startswith("FID of 100 pictures")
    (note,) = fid.FidReference("p", (Path("a.png"), Path("b.JPEG")), 3000).notes(5000)
    assert "some of the reference are JPEG files" in note


def test_it_is_told(line: Line, weights: Path, undrawn: None, here: Path) -> None:
    command = f"evaluate demo --res 48 --limit 2 --steps 1 --ratio 0.4 --no-native --fid dense --fid-weights {weights}"
    made = line(f"{command} -o e.html -o e.toml --json").result
    (size,) = made["sizes"]
    for model in size["models"]:
        assert f'<td class="number">{model["fid"]:.2f}</td>' in (here / "e.html").read_text()
    assert made["fid"]["reference"] == "dense"
    assert made["fid"]["features"]["network"] == "inception-v3-compat"
    assert made["facts"]["FID"] == (
        "against 2 pictures of the dense model at 64x64, of the same prompts from other noise, by "
        "inception-v3-compat; 0 for sets that are alike"
    )
    assert made["notes"][-1].startswith(f"FID of 2 pictures: of less than {WIDTH}, the number of features")
    assert "fid" not in (here / "e.toml").read_text().lower()


def test_an_fid_however_large_changes_no_word(against_dense: Evaluation) -> None:
    far = replace(against_dense, models=tuple(replace(m, fid=1000.0 * m.weight) for m in against_dense.models))
    none = replace(against_dense, models=tuple(replace(m, fid=None) for m in against_dense.models))
    columns, rows = report_text.table(far)
    index = columns.index("FID")
    assert [row[index] for row in rows] == ["0.00", "1000.00", "1500.00"] * 2
    assert [row[:index] + row[index + 1 :] for row in rows] == report_text.table(none)[1]
    assert "FID" not in report_text.table(none)[0]
    assert files.recipe(far, "x") == files.recipe(none, "x")


def test_the_reference_is_drawn_first(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Size, tuple[int, ...]]] = []

    def draw(_: Session, texts: list[str], seeds: list[int], style: Any, on_step: Any) -> list[Image.Image]:
        drawn.append((style.size, tuple(seeds)))
        on_step()
        return pictures(len(texts), seed=seeds[0])

    monkeypatch.setattr(Session, "draw", draw)
    watched = Steps()
    evaluate(replace(REQUEST, limit=2, pictures=2, native=False, weights=(1.0,), fid_weights=weights), watched)
    native, small = Size(64, 64), Size(48, 48)
    assert drawn == [(native, (4, 5, 6)), (native, (7,)), *[(small, (0, 1, 2)), (small, (3,))] * 2]
    assert watched.done["drawing"] == watched.stages["drawing"][0] == 3 * 4


REFUSED = {
    "no-folder": ("--fid nowhere", 2, "nowhere"),
    "a-file": ("--fid one.png", 2, "one.png"),
    "no-pictures": ("--fid empty", 2, "empty"),
    "one-picture": ("--fid one", 2, "FID of a single picture"),
    "one-drawn": ("--fid two --limit 1", 2, "FID of a single picture"),
    "damaged": ("--fid damaged", 2, "damaged/b.png"),
    "huge": ("--fid huge", 2, "huge/b.png"),
    "weights-alone": ("--fid-weights one.png", 2, "--fid-weights"),
    "no-weights": ("--fid two --fid-weights no.pth", 1, "no.pth"),
    "other-weights": ("--fid two --fid-weights one.png", 1, "one.png"),
    "last-seeds": ("--fid dense --seed 18446744073709551612", 2, "seeds"),
    "no-package": ("--fid dense", 1, "torch-fidelity"),
}


@pytest.mark.parametrize(("words", "code", "key"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(
    words: str, code: int, key: str, line: Line, here: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pictures(1)[0]
    image.save(here / "one.png")
    for name, count in {"empty": 0, "one": 1, "two": 2, "damaged": 1, "huge": 1}.items():
        (here / name).mkdir()
        for letter in "ab"[:count]:
            image.save(here / name / f"{letter}.png")
    (here / "damaged" / "b.png").write_bytes((here / "one.png").read_bytes()[:60])
    pictures(1, 40, 40)[0].save(here / "huge" / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    if key == "torch-fidelity":
        monkeypatch.setattr(inception, "find_spec", lambda _: None)
    own = "" if "--fid-weights" in words else f"--fid-weights {weights}"
    limit = "" if "--limit" in words else "--limit 4"
    ran = line(f"evaluate demo --res 48 --steps 1 --no-native -q {words} {own} {limit}")
    if "b.png" in key:  # the rest is Pillow's
        assert (ran.code, key in ran.err) == (code, True)
    else:
        refused(ran, code, key)


def test_a_download_is_announced(line: Line, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "download_url_to_file", failing(URLError("no route")))
    ran = line("evaluate demo --res 48 --limit 4 --steps 1 --fid dense --no-native")
    assert ran.code == 1
    assert "note: 16 pictures of 4 prompts, on cpu in fp32" in ran.err  # of three models, and the reference
    assert f"note: FID's network, 91 MiB, comes from {URL}" in ran.err
    assert "no route" in ran.err


# --- beside torch-fidelity itself ---

# As much of torchvision as torch-fidelity uses to read a folder of PNG files: torch's CPU builds have none.
STUB = """
    import sys, types, numpy, torch

    def module(name, **content):
        made = types.ModuleType(name)
        made.__dict__.update(content)
        sys.modules[name] = made
        return made

    class Compose:
        def __init__(self, steps): self.steps = steps
        def __call__(self, image):
            for step in self.steps: image = step(image)
            return image

    class Nothing: pass

    def pil_to_tensor(image):
        return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).contiguous()

    functional = module("torchvision.transforms.functional", pil_to_tensor=pil_to_tensor)
    transforms = module("torchvision.transforms", Compose=Compose, functional=functional)
    datasets = module("torchvision.datasets", CIFAR10=Nothing, CIFAR100=Nothing, STL10=Nothing)
    module("torchvision", transforms=transforms, datasets=datasets, models=module("torchvision.models"))

    from torch_fidelity import calculate_metrics

    found = calculate_metrics(
        input1=sys.argv[1], input2=sys.argv[2], fid=True, cuda=False, cache=False, verbose=False, batch_size=3,
        feature_extractor_weights_path=sys.argv[3],
    )
    print(found["frechet_inception_distance"])
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
def test_the_number_is_that_of_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its own network, of random weights, and with all of its own code on the other side."""
    module = inception._module()
    made = module.FeatureExtractorInceptionV3
    torch.save({}, tmp_path / "empty.pth")
    with monkeypatch.context() as patch:
        patch.setattr(made, "load_state_dict", lambda *_: None)
        network = made("x", ["2048"], feature_extractor_weights_path=str(tmp_path / "empty.pth"))
    torch.manual_seed(0)
    for part in network.modules():
        if isinstance(part, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    monkeypatch.setattr(inception, "SHA256", hash_file(path, Silent()))
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder, (width, height) in zip(folders, ((96, 64), (64, 80)), strict=True):
        folder.mkdir()
        for number, image in enumerate(pictures(3, width, height, seed=width)):
            image.save(folder / f"{number}.png")
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(STUB), *map(str, folders), str(path)],
        capture_output=True, text=True, check=False, env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    meter = fid.open_meter(fid.choose(str(folders[0]), path, 3), "cpu", Silent())
    assert meter
    moments = Moments()
    meter.add(moments, (Image.open(file) for file in sorted(folders[1].iterdir())))
    assert meter.reference.distance(moments) == pytest.approx(float(ran.stdout.split()[-1]), rel=1e-4)
