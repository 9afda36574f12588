"""FID: the distance of two sets against what others compute, the network, and what an evaluation says of it."""

import io
import json
import math
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from crdiff_export import Size
from crdiff_export.errors import CrdiffError, OptionError, ScorerError
from crdiff_export.evaluate import (
    EvaluateRequest,
    Evaluation,
    evaluate,
    fid,
    files,
    page,
    prepare,
    report_text,
)
from crdiff_export.evaluate.frechet import Moments, Reference
from crdiff_export.evaluate.scorers import inception
from crdiff_export.formats.hashing import hash_file
from crdiff_export.progress import Silent
from tests.support.isolation import Crdiff, Ran

Rows = NDArray[np.float64]
Line = Callable[[str], Ran]
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
    made = Moments(rows.shape[1])
    for start in range(0, len(rows), size):
        made.add(rows[start : start + size])
    return made


def distance(one: Rows, other: Rows) -> float:
    return Reference.of(moments(one)).distance(moments(other))


def wrong(act: Callable[[], object], kind: type[CrdiffError] = ScorerError) -> tuple[str, str]:
    with pytest.raises(kind) as caught:
        act()
    return caught.value.message, caught.value.hint


# --- the distance ---


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_moments_are_those_of_all_rows(size: int) -> None:
    rows = np.random.default_rng(0).normal(1e4, 1e-2, (100, 5))  # where the plain sums of squares lose it all
    found = moments(rows, size)
    assert found.count == 100
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(rows, rowvar=False), rtol=1e-7, atol=1e-12)


def test_of_one_number_it_is_a_formula() -> None:
    """(m₁ - m₂)² + (s₁ - s₂)²."""
    one, other = np.array([[1.0], [3.0], [5.0]]), np.array([[10.0], [14.0], [18.0]])
    assert distance(one, other) == pytest.approx((3 - 14) ** 2 + (2 - 4) ** 2)


def test_of_independent_numbers_it_is_their_sum() -> None:
    corners = np.array([[a, b] for a in (-1.0, 1.0) for b in (-1.0, 1.0)])
    scales = np.array([[1.0, 5.0], [3.0, 2.0]])
    deviation = math.sqrt(4 / 3)
    assert distance(corners * scales[0], corners * scales[1]) == pytest.approx(deviation**2 * (2**2 + 3**2))


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


def test_small_sets_are_too_far_apart() -> None:
    """The bias that the notes warn of: sets of one distribution, and the mean distance falls as they grow."""
    rng = np.random.default_rng(0)
    means = [
        np.mean([distance(rng.normal(0, 1, (count, 30)), rng.normal(0, 1, (count, 30))) for _ in range(5)])
        for count in (10, 40, 160, 640)
    ]
    assert means == sorted(means, reverse=True)
    assert means[0] > 10 * means[-1]


# --- the network ---


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A torch-fidelity that is installed, though its other networks do not work, and torch's empty cache."""
    place = tmp_path / "site"
    (place / "torch_fidelity").mkdir(parents=True)
    for name, text in FAKE.items():
        (place / "torch_fidelity" / name).write_text(textwrap.dedent(text))
    (place / "torch_fidelity-0.4.0.dist-info").mkdir()
    (place / "torch_fidelity-0.4.0.dist-info" / "METADATA").write_text("Name: torch-fidelity\nVersion: 0.4.0\n")
    monkeypatch.syspath_prepend(place)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return place


@pytest.fixture
def weights(tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is taken for the published one."""
    path = tmp_path / "weights.pth"
    path.write_text("0.1")
    monkeypatch.setattr(inception, "SHA256", hash_file(path, Silent()))
    monkeypatch.setattr(inception, "FEATURES", WIDTH)
    return path


def noise(count: int, width: int = 8, height: int = 12, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for _ in range(count)]


def test_pictures_of_all_sizes_and_kinds(weights: Path) -> None:
    network = inception.load("cpu", weights)
    images = [*noise(40), *noise(2, 16, 4), noise(1)[0].convert("L"), *noise(2)]
    found = list(network.features(iter(images)))
    assert [len(rows) for rows in found] == [32, 8, 2, 3]
    assert all(rows.dtype == np.float64 for rows in found)
    wanted = np.stack([features(image.convert("RGB")) for image in images])
    np.testing.assert_allclose(np.concatenate(found)[:, :48], wanted, rtol=1e-5)
    assert list(network.features([])) == []


def test_large_pictures_come_one_by_one(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "PIXELS", 250)
    network = inception.load("cpu", weights)
    assert [len(rows) for rows in network.features([*noise(5), *noise(2, 40, 40)])] == [2, 2, 1, 1, 1]


def test_what_is_no_number_is_refused(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights.write_text("inf")
    monkeypatch.setattr(inception, "SHA256", hash_file(weights, Silent()))
    network = inception.load("cpu", weights)
    assert wrong(lambda: list(network.features(noise(2))))[0] == "FID: a feature of a picture is no finite number"


def test_nothing_else_of_the_package_is_imported_or_left(weights: Path) -> None:
    inception.load("cpu", weights)
    assert not [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]
    with pytest.raises(ImportError, match="torchvision"):
        __import__("torch_fidelity")


def test_a_package_that_somebody_has_imported_is_left_alone(
    weights: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (package / "torch_fidelity" / "__init__.py").write_text("")
    for name in ("torch_fidelity", "torch_fidelity.helpers", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, name, None)  # so that all of them are gone afterwards
        del sys.modules[name]
    import torch_fidelity

    inception.load("cpu", weights)
    assert sys.modules["torch_fidelity"] is torch_fidelity


def test_a_package_that_is_broken(weights: Path, package: Path) -> None:
    (package / "torch_fidelity" / "helpers.py").write_text("raise RuntimeError('operator nms does not exist\\nmore')")
    message, hint = wrong(lambda: inception.load("cpu", weights))
    assert message == "torch-fidelity cannot be imported: operator nms does not exist"
    assert hint == "Install torch-fidelity 0.4 and torch, of versions that go together."


def test_the_fingerprint(weights: Path) -> None:
    assert inception.load("cpu", weights).fingerprint() == {
        "network": "inception-v3-compat", "weights": f"sha256:{inception.SHA256}", "torch-fidelity": "0.4.0",
        "device": "cpu", "dtype": "fp32", "torch": torch.__version__,
    }  # fmt: skip


def test_no_other_file_is_unpickled(weights: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    other.write_text("0.2")
    message, hint = wrong(lambda: inception.load("cpu", other))
    assert message == f"{other}: not the published weights of inception-v3-compat"
    assert hint.endswith("it has to be the file of https://example.org/weights-6726825d.pth.")
    assert wrong(lambda: inception.load("cpu", tmp_path / "no.pth")) == (
        f"{tmp_path / 'no.pth'}: there is no such file",
        "Give --fid-weights the file of https://example.org/weights-6726825d.pth.",
    )


def test_the_weights_are_fetched_once(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def download(url: str, target: str, prefix: str, *, progress: bool) -> None:
        fetched.append((url, prefix, progress))
        Path(target).write_bytes(weights.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    url = "https://example.org/weights-6726825d.pth"
    assert inception.absent() == url
    for _ in range(2):
        inception.load("cpu")
    assert fetched == [(url, inception.SHA256, False)]
    assert inception.absent() is None
    (tmp_path / "hub" / "checkpoints" / "weights-6726825d.pth").write_text("half")
    assert "not the published weights" in wrong(lambda: inception.load("cpu"))[0]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (URLError("no route"), "cannot be fetched: no route"),
        (OSError(28, "No space left on device"), "cannot be fetched: No space left on device"),
        (RuntimeError('invalid hash value (expected "1", got "2")'), "is not the file that it was"),
    ],
    ids=["offline", "full", "changed"],
)
def test_weights_that_cannot_be_fetched(
    weights: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def download(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert wrong(lambda: inception.load("cpu")) == (
        f"https://example.org/weights-6726825d.pth: {message}",
        "Run this where there is a connection, or give the file (91 MiB) with --fid-weights.",
    )


# --- in an evaluation ---


@pytest.fixture
def line(crdiff: Crdiff, here: Path) -> Line:
    return lambda text: crdiff(*shlex.split(text))


def rows_of(packed: Sequence[bytes]) -> Rows:
    return np.stack([features(Image.open(io.BytesIO(data))) for data in packed])


def test_against_the_dense_model(weights: Path, one_thread: None) -> None:
    """The same prompts from other noise: those that an evaluation from the next free seed on draws."""
    found = evaluate(replace(REQUEST, fid_weights=weights))
    other = evaluate(replace(REQUEST, fid=None, sizes=(found.native,), seed=4))
    assert [one.subject.size for one in other.drawn[:1]] == [found.native]
    assert other.pairs == tuple((prompt, seed + 4) for prompt, seed in found.pairs)
    reference = rows_of(other.drawn[0].images)
    assert [one.name for one in found.drawn] == ["dense", "pruned", "POA 2.4365"] * 2
    for one in found.drawn:
        assert one.fid == pytest.approx(by_singular_values(rows_of(one.images), reference), rel=1e-5)
    assert all(one.fid for one in found.drawn), "not even the dense model at that size is at 0"
    assert all(one.fid is None for one in other.drawn)
    assert other.fid is None


def test_against_a_folder(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    images = [*noise(5, 16, 8), *noise(2, 24, 24, seed=1)]
    for place, image in enumerate(images):
        image.save(folder / f"{place}.{'PNG' if place % 2 else 'png'}")
    noise(1)[0].save(folder / "deeper" / "unseen.png")
    (folder / "notes.txt").write_text("no picture")
    found = evaluate(replace(REQUEST, native=False, fid=str(folder), fid_weights=weights))
    reference = np.stack([features(image) for image in images])
    for one in found.drawn:
        assert one.fid == pytest.approx(by_singular_values(rows_of(one.images), reference), rel=1e-5)
    assert found.fid
    assert {key: value for key, value in found.fid.items() if key not in ("features", "reference_sha256")} == {
        "reference": "pictures", "reference_pictures": 7, "pictures": 4,
    }  # fmt: skip
    before = found.fid["reference_sha256"]
    noise(1, seed=9)[0].save(folder / "0.png")
    again = evaluate(replace(REQUEST, native=False, fid=str(folder), fid_weights=weights))
    assert again.fid
    assert before != again.fid["reference_sha256"]


def test_the_reference_has_noise_of_its_own(weights: Path) -> None:
    job = prepare(replace(REQUEST, pictures=2, seed=10, fid_weights=weights))
    assert [seed for _, seed in job.pairs] == list(range(10, 18))
    assert [seed for _, seed in job.reference_pairs] == list(range(18, 26))
    assert [prompt for prompt, _ in job.reference_pairs] == [prompt for prompt, _ in job.pairs]
    plain = prepare(replace(REQUEST, pictures=2, seed=10, fid=None))
    assert (plain.reference_pairs, job.pictures - plain.pictures) == ((), 8)


def test_few_pictures_are_pointed_out() -> None:
    asked = fid.Against("dense", (), 2048)
    assert list(asked.notes(2048)) == []
    (note,) = asked.notes(2047)
    assert note.startswith("FID of 2047 pictures: of less than 2048, the number of features,")
    (note,) = fid.Against("p", (Path("a.png"),), 100).notes(5000)
    assert note.startswith("FID of 100 pictures")
    (note,) = fid.Against("p", (Path("a.png"), Path("b.JPEG")), 3000).notes(5000)
    assert "some of the reference are JPEG files" in note


def test_it_is_told_and_nothing_follows(line: Line, weights: Path, here: Path) -> None:
    asked = f"evaluate demo --res 48 --limit 8 --steps 1 --ratio 0.4 --no-native --fid dense --fid-weights {weights}"
    ran = line(f"{asked} -o e.html -o e.toml")
    assert ran.code == 0, ran.err
    facts = dict(text.split(": ", 1) for text in ran.out.splitlines() if ": " in text)
    assert facts["FID"].strip() == (
        "against 8 pictures of the dense model at 64x64, of the same prompts from other noise, by "
        "inception-v3-compat; 0 for sets that are alike"
    )
    assert f"note: FID of 8 pictures: of less than {WIDTH}, the number of features" in ran.err
    said = json.loads(line(f"{asked} --json").out)
    (size,) = said["sizes"]
    for model in size["models"]:
        assert f"{model['fid']:.2f}" in ran.out
        assert f"<td>{model['fid']:.2f}</td>" in (here / "e.html").read_text()
    assert said["fid"]["reference"] == "dense"
    assert said["fid"]["features"]["network"] == "inception-v3-compat"
    assert "fid" not in (here / "e.toml").read_text().lower()


def test_an_fid_however_large_changes_no_word(weights: Path) -> None:
    found = evaluate(replace(REQUEST, native=False, fid_weights=weights))
    far = replace(found, drawn=tuple(replace(one, fid=1000.0 * one.weight) for one in found.drawn))
    columns, rows = report_text.table(far)
    place = columns.index("FID")
    assert [row[place] for row in rows] == ["0.00", "1000.00", "2436.50"]
    cut = [row[:place] + row[place + 1 :] for row in rows]
    none = replace(found, drawn=tuple(replace(one, fid=None) for one in found.drawn))
    assert cut == report_text.table(none)[1]
    assert "FID" not in report_text.table(none)[0]
    assert files.recipe(far, "x") == files.recipe(none, "x")


def test_the_folder_it_is_in_stays_unsaid(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "somebody" / "pictures <b>"
    folder.mkdir(parents=True)
    for place, image in enumerate(noise(2)):
        image.save(folder / f"{place}.png")
    found: Evaluation = evaluate(replace(REQUEST, native=False, fid=str(folder), fid_weights=weights))
    text = page.render(found) + repr(found.fid) + repr(found.facts)
    assert "somebody" not in text
    assert "2 pictures in pictures &lt;b&gt;, by" in text


def test_interrupted_or_not_the_reference_is_drawn_first(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from crdiff_export.sampling.session import Session

    seen: list[tuple[Size, tuple[int, ...]]] = []
    draw = Session.draw

    def noted(self: Session, prompts: Any, seeds: Any, style: Any, on_step: Any = None) -> Any:
        seen.append((style.size, tuple(seeds)))
        return draw(self, prompts, seeds, style, on_step)

    class Counted(Silent):
        sizes: list[int]
        done = 0

        def stage(self, title: str, size: int, unit: str = "bytes") -> None:
            self.total, self.done = size, 0

        def advance(self, size: int) -> None:
            self.done += size

    monkeypatch.setattr(Session, "draw", noted)
    watched = Counted()
    evaluate(replace(REQUEST, native=False, weights=(1.0,), fid_weights=weights), watched)
    native, small = Size(64, 64), Size(48, 48)
    assert seen == [(native, (4, 5, 6)), (native, (7,)), *[(small, (0, 1, 2)), (small, (3,))] * 2]
    assert watched.done == watched.total == 3 * 4


REFUSED = {
    "no-folder": ("--fid nowhere", 2, "nowhere: No such file or directory", "a folder of PNG or JPEG pictures"),
    "a-file": ("--fid one.png", 2, "one.png: Not a directory", "the word dense"),
    "no-pictures": ("--fid empty", 2, "empty: has no picture", "FID takes what ends in .png, .jpg, .jpeg."),
    "one-picture": ("--fid one", 2, "FID of a single picture", "thousands"),
    "one-drawn": ("--fid two --limit 1", 2, "FID of a single picture", "thousands"),
    "damaged": ("--fid damaged", 2, "damaged/b.png: cannot be read as a picture", "take it out of the folder"),
    "huge": ("--fid huge", 2, "huge/b.png: cannot be read as a picture", "take it out of the folder"),
    "weights-alone": ("--fid-weights one.png", 2, "--fid-weights without --fid", "leave it out"),
    "no-weights": ("--fid two --fid-weights no.pth", 1, "no.pth: there is no such file", "Give --fid-weights the file"),
    "other-weights": ("--fid two --fid-weights one.png", 1, "one.png: not the published weights", "run this again"),
    "last-seeds": ("--fid dense --seed 18446744073709551612", 2, "there are not so many seeds", "smaller --seed"),
}


@pytest.mark.parametrize(("words", "code", "message", "hint"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(
    words: str,
    code: int,
    message: str,
    hint: str,
    line: Line,
    here: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = noise(1)[0]
    image.save(here / "one.png")
    for name, count in {"empty": 0, "one": 1, "two": 2, "damaged": 1, "huge": 1}.items():
        (here / name).mkdir()
        for place in range(count):
            image.save(here / name / f"{'ab'[place]}.png")
    (here / "damaged" / "b.png").write_bytes((here / "one.png").read_bytes()[:60])
    noise(1, 40, 40)[0].save(here / "huge" / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    own = "" if "--fid-weights" in words else f"--fid-weights {weights}"
    limit = "" if "--limit" in words else "--limit 4"
    ran = line(f"evaluate demo --res 48 --steps 1 --no-native {words} {own} {limit}")
    assert ran.code == code, ran.err
    assert message in ran.err
    assert hint in ran.err
    assert "Traceback" not in ran.err


def test_without_the_package(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "find_spec", lambda _: None)
    ran = line("evaluate demo --res 48 --limit 4 --steps 1 --fid dense")
    assert ran.code == 1
    assert "torch-fidelity is not installed, which FID needs" in ran.err
    assert 'pip install "crdiff-export[fid]"' in ran.err


def test_a_download_is_announced(line: Line, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    ran = line("evaluate demo --res 48 --limit 4 --steps 1 --fid dense --no-native")
    assert ran.code == 1
    assert "note: FID's network, 91 MiB, comes from https://example.org/weights-6726825d.pth" in ran.err
    assert "cannot be fetched: no route" in ran.err


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
        for place, image in enumerate(noise(3, width, height, seed=width)):
            image.save(folder / f"{place}.png", pnginfo=PngImagePlugin.PngInfo())
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(STUB), *map(str, folders), str(path)],
        capture_output=True, text=True, check=False, env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    asked = fid.choose(str(folders[0]), path, 3)
    meter = fid.opened(asked, "cpu", Silent())
    assert meter
    seen = meter.start()
    meter.see(seen, (Image.open(file) for file in sorted(folders[1].iterdir())))
    assert meter.distance(seen) == pytest.approx(float(ran.stdout.split()[-1]), rel=1e-4)


def test_a_reference_is_a_usage_error_where_it_is_not_there(weights: Path, tmp_path: Path) -> None:
    assert wrong(lambda: fid.choose(str(tmp_path / "no"), weights, 4), OptionError)[0].endswith(
        "No such file or directory"
    )
