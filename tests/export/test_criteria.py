"""Exports by every criterion: bytes, headers, what gives the base back, verification, and what is refused."""

import hashlib
import json
import struct
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crdiff_export import Size, export
from crdiff_export.errors import CalibrationError, CrdiffError, CriterionError, OptionError, VerifyError
from crdiff_export.export import Baked, plan_variant, prepare, run_together
from crdiff_export.formats.checkpoint import open_checkpoint
from crdiff_export.models.recipe import Evidence
from crdiff_export.progress import Silent
from crdiff_export.prune import kernels
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.ranking import rank
from crdiff_export.publish import report
from crdiff_export.publish.run import publish
from crdiff_export.publish.worklist import PublishRequest, make_worklist
from crdiff_export.verify.inspect import inspect
from crdiff_export.verify.reopen import open_baked, read_decision
from crdiff_export.verify.residual_reader import dense_weights
from crdiff_export.verify.restore import restore
from crdiff_export.verify.verify import Verified, verify
from tests.support import makers, masking, oracle
from tests.support.isolation import Crdiff
from tests.support.masking import SIZE, Base
from tests.support.messages import raises

UNET, DIT = "sd15.original", "sd3-medium.original-transformer"
SCORED = ("random:seed=3", "random:compare=row,seed=3", "wanda", "wanda:compare=row", "taylor", "adverse:form=signed")
SCORED_EXPORTS = [
    *((table, criterion) for table in (UNET, DIT) for criterion in SCORED),
    ("sd15.diffusers-unet", "random:compare=row,seed=3"),
    ("sdxl.original", "wanda"),
    ("sd35-medium.diffusers-transformer", "random:seed=3"),
    ("flux-dev.original-transformer", "wanda:compare=row"),
    ("flux-dev.diffusers-transformer", "wanda"),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Base]:
    """Narrow bases with calibrations, each made once; not to be changed."""

    @cache
    def made(table: str, dtype: str = "F16", shards: int = 0, size: Size = SIZE) -> Base:
        return masking.base(tmp_path_factory.mktemp("base"), table, dtype, shards=shards, size=size)

    return made


@pytest.fixture(scope="module")
def exports(bases: Callable[..., Base], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Base, Path]]:
    """A base and an export of it; neither to be changed."""

    @cache
    def made(criterion: str, table: str = UNET, **options: Any) -> tuple[Base, Path]:
        base = bases(table)
        output = tmp_path_factory.mktemp("out") / "out.safetensors"
        return base, export(base.request(output, criterion, **options)).written.path

    return made


def whole(path: Path) -> str:
    """What `sha256sum` says of a file, in our spelling."""
    return f"0x{hashlib.sha256(path.read_bytes()).hexdigest()}"


def raised(call: Callable[[], object], kind: type[CrdiffError]) -> tuple[str, str]:
    with pytest.raises(kind) as caught:
        call()
    return caught.value.message, caught.value.hint


def files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]


def hold(base: Base, output: Path, criterion: str, source: Any = None) -> list[dict[str, str]]:
    """Assert that an output is the base with zeros where the criterion's smallest scores are; its files' metadata."""
    source = source or base.files
    masks = masking.choose(base, criterion, masking.weights(base, source))
    expected = masking.cleared(base, source, masks)
    said = []
    for number, file in enumerate(files(output)):
        content = oracle.read(file)
        assert {n: data for n, (_, _, data) in content.tensors().items()} == expected[number]
        said.append(content.metadata)
    groups = {piece.group for piece in base.slices()}
    for group in groups:
        own = [m for p, m in zip(base.slices(), masks, strict=True) if p.group == group]
        for keys in said:
            assert int(keys[f"crdiff.pruned.{group}"]) == sum(int(mask.sum()) for mask in own)
            assert int(keys[f"crdiff.total.{group}"]) == sum(mask.size for mask in own)
    return said


# Bytes and headers.


@pytest.mark.parametrize(("table", "criterion"), SCORED_EXPORTS)
def test_what_scores_least_is_zero(table: str, criterion: str, exports: Callable[..., tuple[Base, Path]]) -> None:
    base, output = exports(criterion, table)
    (said,) = hold(base, output, criterion)
    assert said["crdiff.schema"] == "1"
    assert said["crdiff.criterion"] == criterion
    assert said["crdiff.mask"] == "zeros"
    assert said["crdiff.method"] == ("layer-wise" if base.dit else "block-wise")
    assert not [key for key in said if key.startswith("crdiff.threshold")]
    assert "crdiff.moved" not in said
    assert said.get("crdiff.calibration.size") == (None if "random" in criterion else "512x512")
    digest = whole(base.calibration)
    assert said.get("crdiff.calibration.file_sha256") == (None if "random" in criterion else digest)
    assert said["modelspec.hash_sha256"] == oracle.sha256(output)


def test_shards_have_the_whole_header_each(bases: Callable[..., Base], tmp_path: Path) -> None:
    base = bases("sd3-medium.diffusers-transformer", shards=3)
    output = export(base.request(tmp_path / "out", "wanda", residual="sidecar")).written.path
    headers = hold(base, output, "wanda")
    assert len(headers) == 3
    assert len({keys["crdiff.pruned.blocks"] for keys in headers}) == 1
    assert check(output, base.path, base.calibration).residual == "sidecar"
    restore(output, tmp_path / "again")
    for file in base.path.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_cast_is_ranked_as_it_is_written(dtype: str, bases: Callable[..., Base], tmp_path: Path) -> None:
    from crdiff_export.prune.kernels.cast import cast

    base = bases(UNET)
    output = export(base.request(tmp_path / "out.safetensors", "wanda", dtype=dtype)).written.path
    target = {"fp32": "F32", "bf16": "BF16"}[dtype]
    source = [
        {
            name: (target, shape, bytes(cast(memoryview(data), kind, target))) if kind == "F16" else (kind, shape, data)
            for name, (kind, shape, data) in base.files[0].items()
        }
    ]
    hold(base, output, "wanda", source)
    assert verify(output, str(base.path), Silent(), calibration=base.calibration).against == "all"
    assert verify(output, str(base.path), Silent()).against == "zeros"


def test_ratios_of_zero_leave_groups_alone(bases: Callable[..., Base], tmp_path: Path) -> None:
    base = bases(UNET)
    ratios = {"down": 0.0, "mid": 0.5, "up": 0.0}
    output = export(base.request(tmp_path / "out.safetensors", "wanda", ratios=ratios)).written.path
    said = makers.metadata_of(output)
    assert (said["crdiff.pruned.down"], said["crdiff.pruned.up"]) == ("0", "0")
    assert int(said["crdiff.pruned.mid"]) > 0
    content = oracle.read(output).tensors()
    for piece in base.slices():
        if piece.group != "mid":
            assert content[piece.tensor][2] == base.files[0][piece.tensor][2]
    nothing = export(base.request(tmp_path / "none.safetensors", "wanda", ratios=dict.fromkeys(ratios, 0.0)))
    assert nothing.written.path.read_bytes()[-1000:] == base.path.read_bytes()[-1000:]
    assert nothing.stamp.masked == "block-wise"
    for path in (output, nothing.written.path):
        assert verify(path, str(base.path), Silent()).against == "zeros"


def decided(base: Base, criterion: str) -> tuple[Any, Any]:
    """The plan, and what `criteria` decides for it, which other tests hold against slow implementations."""
    request = base.request(Path("unused.safetensors"), criterion)
    planned = plan_variant(request, open_checkpoint(base.path))
    choice = CriterionChoice.of(criterion, base.calibration)
    return planned, rank(choice, [planned], kernels.load("cpu"), Silent()).decide(planned)


@pytest.mark.parametrize("table", [UNET, DIT])
@pytest.mark.parametrize("criterion", ["obs", "obs:compensate=off", "obs:compare=row", "obs:compare=layer"])
def test_obs(criterion: str, table: str, exports: Callable[..., tuple[Base, Path]]) -> None:
    """What stays has moved, unless it is told not to."""
    base, output = exports(criterion, table)
    planned, found = decided(base, criterion)
    content, said = oracle.read(output).tensors(), makers.metadata_of(output)
    moves = criterion != "obs:compensate=off"
    assert said.get("crdiff.moved") == ("true" if moves else None)
    expected = {name: bytearray(data) for name, (_, _, data) in base.files[0].items()}
    differing = 0
    for number, target in enumerate(planned.targets):
        mask = found.masks[number].unpack()
        bits = np.frombuffer(expected[target.source.name], "<u2")[target.start : target.stop]
        before = bits.copy()
        bits[:] = found.moved[number] if moves else np.where(mask, 0, bits)
        differing += int((bits[~mask] != before[~mask]).sum())
        assert ((bits == 0) == mask).all()
    assert (differing > 0) == moves
    assert {n: data for n, (_, _, data) in content.items()} == {n: bytes(d) for n, d in expected.items()}


def test_several_variants_are_those_of_one_alone(bases: Callable[..., Base], tmp_path: Path) -> None:
    base = bases("demo.original-unet")
    sets = (
        {"down": 0.2, "mid": 0.6, "up": 0.4},
        {"down": 0.5, "mid": 0.0, "up": 0.1},
        {"down": 0, "mid": 0, "up": 0},
    )
    for criterion in ("wanda", "random", "obs"):
        name = criterion + "-{}-{}.safetensors"
        requests = [
            base.request(tmp_path / name.format("together", i), criterion, ratios=ratios)
            for i, ratios in enumerate(sets)
        ]
        results = list(run_together([prepare(request) for request in requests], Silent()))
        for i, (request, baked) in enumerate(zip(requests, results, strict=True)):
            assert isinstance(baked, Baked)
            alone = export(replace(request, output=tmp_path / name.format("alone", i)))
            assert baked.written.path.read_bytes() == alone.written.path.read_bytes()
            assert baked.thresholds == alone.thresholds
            assert baked.stamp == alone.stamp


def test_uniform_prunes_as_many_with_one_ratio(bases: Callable[..., Base], tmp_path: Path) -> None:
    base = bases(UNET)
    block = export(base.request(tmp_path / "block.safetensors", "magnitude"))
    even = export(base.request(tmp_path / "even.safetensors", "uniform"))
    totals = {name: group.total for name, group in even.stamp.groups.items()}
    mean = sum(base.ratios[name] * total for name, total in totals.items()) / sum(totals.values())
    assert len({group.ratio for group in even.stamp.groups.values()}) == 1
    assert even.stamp.groups["mid"].ratio == pytest.approx(mean, abs=1e-15)
    ratios = {name: group.ratio for name, group in even.stamp.groups.items()}
    oracle.hold(base.path, even.written.path, oracle.expect(base.files, ratios, base.kinds))
    count = [sum(group.pruned for group in made.stamp.groups.values()) for made in (block, even)]
    assert count[0] == pytest.approx(count[1], rel=1e-3)
    said = makers.metadata_of(even.written.path)
    assert said["crdiff.criterion"] == "uniform"
    assert "crdiff.mask" not in said
    assert said["crdiff.provenance.source"] == "mean of 0.2/0.6/0.4 (given on the command line)"
    given = export(base.request(tmp_path / "given.safetensors", "uniform", ratios={}, ratio=0.25))
    plain = export(base.request(tmp_path / "plain.safetensors", "magnitude", ratios={}, ratio=0.25))
    assert {group.ratio for group in given.stamp.groups.values()} == {0.25}
    assert given.stamp.groups == plain.stamp.groups
    assert verify(even.written.path, str(base.path), Silent()).against == "all"


RECIPE = """
[model]
family = "sd15"
title = "test"
native = "512x512"
[[variant]]
resolution = "512x512"
ratios = {{ down = 0.2, mid = 0.6, up = 0.4 }}
poa_weight = 1.5
provenance = "searched"
source = "a search"
evidence = {{ scorer = "x", pruned = 0.5{} }}
"""


@pytest.mark.parametrize(
    ("found_with", "criterion", "keeps"),
    [("", "magnitude", True), ("", "wanda", False), ("wanda", "wanda", True), ("wanda", "magnitude", False),
     ("", "uniform", False), ("wanda:compare=row", "wanda", False)],
)  # fmt: skip
def test_evidence_is_for_the_criterion_it_was_found_with(
    found_with: str, criterion: str, keeps: bool, bases: Callable[..., Base], tmp_path: Path
) -> None:
    (tmp_path / "own.toml").write_text(RECIPE.format(f', criterion = "{found_with}"' if found_with else ""))
    base = bases(UNET)
    request = base.request(tmp_path / "out.safetensors", criterion, ratios={}, recipe=tmp_path / "own.toml")
    stamp = export(request).stamp
    assert stamp.provenance == ("searched" if keeps else "starting-point")
    assert bool(stamp.evidence) == keeps
    named = {"uniform": "mean of 0.2/0.6/0.4 (a search; found with magnitude)"}.get(
        criterion, f"a search; found with {found_with or 'magnitude'}"
    )
    assert stamp.provenance_source == ("a search" if keeps else named)


def test_another_size_is_noted(bases: Callable[..., Base], tmp_path: Path) -> None:
    base = bases(UNET, size=Size(384, 640))
    job = prepare(base.request(tmp_path / "out.safetensors", "wanda"))
    (note,) = [note for note in job.plan.notes if "384x640" in note]
    assert "512x512" in note
    others = prepare(base.request(tmp_path / "out.safetensors", "random")).plan.notes
    assert not [note for note in others if "384x640" in note]
    said = makers.metadata_of(export(base.request(tmp_path / "out.safetensors", "wanda")).written.path)
    assert said["crdiff.calibration.size"] == "384x640"


# The way back.


@pytest.mark.parametrize("criterion", ["wanda", "random:compare=row", "obs:compensate=off"])
@pytest.mark.parametrize(("table", "way"), [(UNET, "embed"), (UNET, "sidecar"), (DIT, "sidecar")])
def test_a_residual_gives_the_base_back(
    table: str, way: str, criterion: str, bases: Callable[..., Base], tmp_path: Path
) -> None:
    base = bases(table)
    output = export(base.request(tmp_path / "out.safetensors", criterion, residual=way)).written.path
    restored = restore(output, tmp_path / "again.safetensors", chunk=4099)
    assert restored.whole
    assert restored.path.read_bytes() == base.path.read_bytes()
    calibration = None if "random" in criterion else base.calibration
    for given in {None, calibration}:
        found = verify(output, str(base.path), Silent(), calibration=given)
        assert found.residual == ("embedded" if way == "embed" else "sidecar")
        assert found.against == ("all" if given == calibration else "zeros")


def test_the_dense_weights_from_a_residual(bases: Callable[..., Base], tmp_path: Path) -> None:
    base = bases("flux-dev.original-transformer")
    output = export(base.request(tmp_path / "out.safetensors", "wanda", residual="sidecar")).written.path
    for target, weights in dense_weights(open_baked(output)):
        data = base.files[0][target.source.name][2]
        assert weights.tobytes() == data[2 * target.start : 2 * target.stop]


def test_what_was_decided_can_be_read_back(exports: Callable[..., tuple[Base, Path]]) -> None:
    for criterion in ("wanda", "obs"):
        base, output = exports(criterion)
        _, expected = decided(base, criterion)
        baked = open_baked(output)
        found = read_decision(baked)
        assert [m and m.bits.tobytes() for m in found.masks or ()] == [m and m.bits.tobytes() for m in expected.masks]
        assert [t.pruned for t in found.thresholds] == [t.pruned for t in expected.thresholds]
        assert {i: w.tobytes() for i, w in found.moved.items()} == {i: w.tobytes() for i, w in expected.moved.items()}
        assert read_decision(baked, moved=False).moved == {}
    _, output = exports("magnitude")
    baked = open_baked(output)
    assert read_decision(baked).thresholds == baked.thresholds
    assert read_decision(baked).masks is None


# Verification.


def check(path: Path, base: Path | None = None, calibration: Path | None = None) -> Verified:
    return verify(path, str(base) if base else None, Silent(), calibration=calibration)


def refused(path: Path, base: Path | None = None, calibration: Path | None = None) -> str:
    return raised(lambda: check(path, base, calibration), VerifyError)[0]


def changed(path: Path, name: str, place: int, data: bytes, to: Path) -> Path:
    """A copy of a file with other bytes in a tensor, and without the hash that would tell."""
    return makers.said(makers.changed(path, name, {place: data}, to), {"modelspec.hash_sha256": None}, to)


def test_how_far_a_base_proves_a_file(exports: Callable[..., tuple[Base, Path]]) -> None:
    base, output = exports("wanda")
    assert (check(output).against, check(output).base, check(output).hashed) == ("nothing", None, True)
    assert check(output, base.path).against == "zeros"
    assert check(output, base.path, base.calibration).against == "all"
    for criterion in ("random:seed=3", "magnitude", "uniform"):
        base, output = exports(criterion)
        assert check(output, base.path).against == "all"
    base, output = exports("obs")
    assert check(output).against == "nothing"
    assert check(output, base.path).against == "others"
    assert check(output, base.path, base.calibration).against == "all"
    for table in (DIT, "flux-dev.original-transformer"):
        base, output = exports("wanda:compare=row", table)
        assert check(output, base.path).against == "zeros"
        assert check(output, base.path, base.calibration).against == "all"


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_weights_that_are_no_numbers_stay(dtype: str, tmp_path: Path) -> None:
    base = masking.base(tmp_path, UNET, "F32")
    piece = base.slices()[4]
    content = dict(base.files[0])
    kind, shape, data = content[piece.tensor]
    content[piece.tensor] = kind, shape, struct.pack("<3f", np.nan, np.inf, -np.inf) + data[12:]
    makers.write(base.path, content)
    odd = replace(base, files=(content,))
    refusing = odd.request(tmp_path / "out.safetensors", "random:compare=row", dtype=dtype)
    assert "3 target weights are not finite" in raised(lambda: export(refusing), CrdiffError)[0]
    output = export(replace(refusing, allow_nonfinite=True)).written.path
    assert makers.metadata_of(output)[f"crdiff.nonfinite.{piece.group}"] == "3"
    assert check(output, base.path).against == "all"
    if dtype == "fp32":
        hold(odd, output, "random:compare=row")


def piece_of(base: Base, output: Path) -> tuple[str, np.ndarray[Any, Any]]:
    """A pruned layer's tensor, and its raw bits in the file."""
    piece = base.slices()[0]
    return piece.tensor, np.frombuffer(oracle.read(output).tensors()[piece.tensor][2], "<u2")


def beside_targets(base: Base, output: Path, to: Path) -> tuple[str, Path]:
    """The name of a tensor that is no target, and a copy of the output with another bit in it."""
    name = next(n for n in base.files[0] if "attn2.to_q" in n)
    last = oracle.read(output).tensors()[name][2][2:3]
    return name, changed(output, name, 2, bytes([last[0] ^ 1]), to)


def test_tampering_that_counts_tell(exports: Callable[..., tuple[Base, Path]], tmp_path: Path) -> None:
    base, output = exports("wanda")
    name, bits = piece_of(base, output)
    pruned = int(makers.metadata_of(output)["crdiff.pruned.down"])
    zero, kept = int((bits == 0).argmax()), int((bits != 0).argmax())
    more = changed(output, name, 2 * kept, b"\x00\x00", tmp_path / "more")
    fewer = changed(output, name, 2 * zero, b"\x01\x3c", tmp_path / "fewer")
    assert refused(more) == f"{more}: {pruned + 1} weights of down are zero, crdiff.pruned.down is {pruned}"
    assert refused(fewer) == f"{fewer}: {pruned - 1} weights of down are zero, crdiff.pruned.down is {pruned}"
    whole = makers.said(
        fewer, {"crdiff.pruned.down": str(pruned - 1), "crdiff.ratio.down": "0.199"}, tmp_path / "whole"
    )
    assert check(whole)
    # A zero became a weight, and only the base can tell.
    assert refused(whole, base.path) == f"{whole}: {name!r} at byte {2 * zero} is not what the base gives"
    assert refused(whole, base.path, base.calibration).endswith(" go otherwise")


def test_tampering_that_only_the_base_tells(exports: Callable[..., tuple[Base, Path]], tmp_path: Path) -> None:
    """A weight that stays is another; another layer is another; a zero has moved."""
    base, output = exports("wanda")
    name, bits = piece_of(base, output)
    zero, kept = int((bits == 0).argmax()), int((bits != 0).argmax())
    other = changed(output, name, 2 * kept, struct.pack("<H", bits[kept] ^ 1), tmp_path / "other")
    assert check(other)
    for calibration in (None, base.calibration):
        assert f"{other}: {name!r} at byte {2 * kept} " in refused(other, base.path, calibration)
    outside, beside = beside_targets(base, output, tmp_path / "beside")
    assert check(beside)
    for calibration in (None, base.calibration):
        assert refused(beside, base.path, calibration) == f"{beside}: {outside!r} at byte 2 is not what the base gives"
    dense = np.frombuffer(base.files[0][name][2], "<u2")
    swapped = changed(output, name, 2 * kept, b"\x00\x00", tmp_path / "swapped")
    swapped = changed(swapped, name, 2 * zero, struct.pack("<H", dense[zero] or 1), tmp_path / "swapped")
    if dense[zero]:
        assert check(swapped, base.path).against == "zeros", "nothing but zeros is new"
    assert refused(swapped, base.path, base.calibration).endswith(f"weights of {name!r} go otherwise")


def test_tampering_with_moved_weights(exports: Callable[..., tuple[Base, Path]], tmp_path: Path) -> None:
    base, output = exports("obs")
    name, bits = piece_of(base, output)
    kept = int((bits != 0).argmax())
    other = changed(output, name, 2 * kept, struct.pack("<H", bits[kept] ^ 8), tmp_path / "other")
    assert check(other, base.path).against == "others", "only the calibration can tell"
    assert refused(other, base.path, base.calibration) == (
        f"{other}: 1 of {bits.size} weights of {name!r} are not what {base.path} and the calibration give"
    )
    sign = changed(output, name, 2 * kept, struct.pack("<H", bits[kept] ^ 0x8000), tmp_path / "sign")
    assert "1 of " in refused(sign, base.path, base.calibration)
    near = changed(output, name, 2 * kept, struct.pack("<H", bits[kept] ^ 1), tmp_path / "near")
    assert check(near, base.path, base.calibration).against == "all", "another processor's last bit"
    outside, beside = beside_targets(base, output, tmp_path / "beside")
    assert refused(beside, base.path) == f"{beside}: {outside!r} at byte 2 is not what the base gives"
    honest = makers.said(output, {"crdiff.moved": None}, tmp_path / "honest")
    assert "is not what the base gives" in refused(honest, base.path)
    assert "crdiff.moved says otherwise" in refused(honest, base.path, base.calibration)
    base, output = exports("wanda")  # which moves nothing
    excused = makers.said(output, {"crdiff.moved": "true"}, tmp_path / "excused")
    assert refused(excused, base.path) == f"{excused}: crdiff.moved is true, but 'wanda' moves no weights"


def test_evidence_of_another_calibration_is_none(exports: Callable[..., tuple[Base, Path]], tmp_path: Path) -> None:
    base, _ = exports("wanda")
    asked = CriterionChoice.of("wanda", base.calibration)
    assert asked.calibration

    def judged(**extra: str) -> tuple[str, str, bool]:
        evidence = Evidence("s", 0.5, extra=extra)
        plan = plan_variant(base.request(tmp_path / "o.safetensors", "magnitude"), open_checkpoint(base.path))
        variant = replace(plan.variant, provenance="searched", source="a search", evidence=evidence)
        made = asked.drop_foreign_numbers(variant)
        return made.provenance, made.source, made.evidence is not None

    own = asked.calibration.hash
    assert judged(criterion="wanda:compare=block", calibration=own) == ("searched", "a search", True)
    other = "a search; found with wanda by another calibration"
    assert judged(criterion="wanda", calibration="0x12") == ("starting-point", other, False)
    assert judged() == ("starting-point", "a search; found with magnitude", False)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("crdiff.criterion", "magnitude", "crdiff.mask does not go with magnitude"),
        ("crdiff.method", "layer-wise", "crdiff.method is not that of SD1.5"),
        ("crdiff.ratio.mid", "0.9", "crdiff.ratio.mid asks for 5760"),
    ],
)
def test_a_header_that_does_not_hold(
    key: str, text: str, message: str, exports: Callable[..., tuple[Base, Path]], tmp_path: Path
) -> None:
    assert message in refused(makers.said(exports("wanda")[1], {key: text}, tmp_path / "broken"))


def test_rows_may_round_down(exports: Callable[..., tuple[Base, Path]], tmp_path: Path) -> None:
    _, output = exports("wanda:compare=row", DIT)
    assert check(output)
    ratio = makers.said(output, {"crdiff.ratio.blocks": "0.45"}, tmp_path / "ratio")
    assert "asks for" in refused(ratio)
    layered = exports("obs:compare=layer", DIT)[1]
    assert check(layered)
    assert "asks for" in refused(makers.said(layered, {"crdiff.ratio.blocks": "0.6"}, tmp_path / "layered"))


def test_calibrations_that_are_not_the_files(exports: Callable[..., tuple[Base, Path]], tmp_path: Path) -> None:
    base, output = exports("wanda")
    raw = bytearray(base.calibration.read_bytes())
    raw[-1] ^= 1
    number = tmp_path / "number.safetensors"
    number.write_bytes(raw)
    content = makers.read(base.calibration)
    header = makers.metadata_of(base.calibration)
    assert whole(makers.write(tmp_path / "same.safetensors", content, header)) == whole(base.calibration)
    assert check(output, base.path, tmp_path / "same.safetensors").against == "all", "its name does not matter"
    said = {"size": str(Size(384, 640)), "base": "another", "facts.steps": "50"}
    others = [
        makers.write(tmp_path / f"{key}.safetensors", content, {**header, f"crdiff.calibration.{key}": text})
        for key, text in said.items()
    ]
    for other in (number, *others):
        message, hint = raised(partial(check, output, base.path, other), VerifyError)
        assert message == (
            f"{other}: hashes to {whole(other)}, crdiff.calibration.file_sha256 of out.safetensors is "
            f"{whole(base.calibration)}"
        )
        assert hint == "Give the calibration that the file was made with."
    assert str(base.calibration) in raised(lambda: check(output, None, base.calibration), OptionError)[0]
    for criterion in ("magnitude", "random"):
        plain = exports(criterion)[1]
        message, _ = raised(partial(check, plain, base.path, base.calibration), OptionError)
        assert message == f"{plain}: was made without a calibration ({criterion!r})"


def test_a_criterion_that_is_not_installed(exports: Callable[..., tuple[Base, Path]], tmp_path: Path) -> None:
    """Its zeros can be held against the base all the same."""
    base, output = exports("random")
    foreign = makers.said(output, {"crdiff.criterion": "theirs:power=2"}, tmp_path / "foreign")
    assert check(foreign, base.path).against == "zeros"
    assert inspect(foreign).stamp


# Refusals, and what the command line says.


def test_calibrations_that_do_not_fit(bases: Callable[..., Base], tmp_path: Path) -> None:
    base, other = bases(UNET), bases(DIT)
    mixed = base.request(tmp_path / "out.safetensors", "wanda", calibration=other.calibration)
    message, _ = raised(lambda: prepare(mixed), CalibrationError)
    assert message == f"{other.calibration}: is of the family 'sd3-medium', {base.path} of sd15"
    fewer = {name: {"norm": found["norm"]} for name, found in base.statistics.items()}
    norms = masking.write_calibration(tmp_path / "norms.safetensors", fewer, {}, "sd15")
    taylor = base.request(tmp_path / "out.safetensors", "taylor", calibration=norms)
    assert raised(lambda: prepare(taylor), CalibrationError)[0].startswith(f"{norms}: has no gradient")
    fewer.popitem()
    some = masking.write_calibration(tmp_path / "some.safetensors", fewer, {}, "sd15")
    wanda = base.request(tmp_path / "out.safetensors", "wanda", calibration=some)
    assert raised(lambda: prepare(wanda), CalibrationError)[0].startswith(f"{some}: has no norm of ")
    foreign = masking.write_calibration(
        tmp_path / "foreign.safetensors", base.statistics, dict.fromkeys(base.statistics, "0" * 16), "sd15"
    )
    made = base.request(tmp_path / "out.safetensors", "wanda", calibration=foreign)
    assert " was made of another base: " in raised(lambda: export(made), CalibrationError)[0]
    assert not (tmp_path / "out.safetensors").exists()


# Options, the exit code and the key of the message.
REFUSED = {
    "unknown": ("--criterion wnda", 2, "'wnda'"),
    "needs one": ("--criterion wanda:compare=row", 2, "wanda:compare=row needs a calibration"),
    "needs none": ("--criterion random --calibration {cal}", 2, "random needs no calibration"),
    "by default": ("--calibration {cal}", 2, "magnitude needs no calibration"),
    "no file": ("--criterion wanda --calibration gone", 1, "gone: no such file"),
    "no calibration": ("--criterion wanda --calibration {base}", 1, "{base}"),
    "residual": ("--criterion obs --calibration {cal} --residual embed", 2, "--residual embed and obs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_command_line_refuses(case: str, crdiff: Crdiff, bases: Callable[..., Base], here: Path) -> None:
    options, code, key = REFUSED[case]
    base = bases(UNET)
    paths = {"cal": base.calibration, "base": base.path}
    ran = crdiff("export", base.path, "--res", "512", "-o", "o.safetensors", "--json", *options.format(**paths).split())
    assert ran.code == code
    assert key.format(**paths) in ran.error["message"]
    assert ran.error["hint"]
    assert not (here / "o.safetensors").exists()


def test_the_command_line_exports_shows_and_verifies(crdiff: Crdiff, bases: Callable[..., Base], here: Path) -> None:
    base = bases(UNET)
    args = ("export", base.path, "--res", "512", "--ratio", "0.3", "-o", "o.safetensors", "--criterion",
            "wanda:compare=row", "--calibration", base.calibration)  # fmt: skip
    dry = crdiff(*args, "--dry-run")
    assert "with a mask by wanda:compare=row and " in dry.out
    planned = crdiff(*args, "--dry-run", "--json").result
    assert (planned["criterion"], planned["calibration"]) == ("wanda:compare=row", str(base.calibration))
    ran = crdiff(*args)
    assert ran.code == 0
    assert "wanda:compare=row" in ran.out
    assert " mask " in ran.out.replace("\n", " ")
    digest = whole(base.calibration)
    again = crdiff(*args, "--force", "--json").result
    assert (again["criterion"], again["calibration"], again["moved"]) == ("wanda:compare=row", digest, False)
    shown = crdiff("inspect", "o.safetensors").out
    assert "by wanda:compare=row" in shown
    assert "its zeros, compared within each output row" in shown
    assert f"{digest}, made at 512x512" in " ".join(shown.split())
    keys = crdiff("inspect", "o.safetensors", "--json").result["crdiff"]
    assert (keys["mask"], keys["calibration.file_sha256"]) == ("zeros", digest)
    alone = crdiff("verify", "o.safetensors")
    assert alone.code == 0
    assert "against" not in alone.out
    zeros = crdiff("verify", "o.safetensors", "--base", base.path)
    assert f"nothing but zeros new against {base.path}" in zeros.out
    assert "would choose these zeros was not checked: give --calibration" in zeros.err
    every = crdiff("verify", "o.safetensors", "--base", base.path, "--calibration", base.calibration)
    assert f"every byte against {base.path}" in every.out
    assert "note" not in every.err
    found = crdiff("verify", "o.safetensors", "--base", base.path, "--json").result
    assert (found["verified"], found["against_base"]) == (True, "zeros")
    lone = crdiff("verify", "o.safetensors", "--calibration", base.calibration)
    assert lone.code == 2
    assert "decides nothing without the base's weights" in lone.err


def test_the_command_line_says_that_weights_moved(crdiff: Crdiff, bases: Callable[..., Base], here: Path) -> None:
    base = bases(UNET)
    args = ("export", base.path, "--res", "512", "--ratio", "0.3", "-o", "o.safetensors", "--criterion", "obs",
            "--calibration", base.calibration)  # fmt: skip
    assert "compared within each group, which moves what stays" in crdiff(*args, "--dry-run").out
    assert crdiff(*args).code == 0
    assert (here / "o.safetensors").exists()
    shown = " ".join(crdiff("inspect", "o.safetensors").out.split())
    assert "compared within each group of blocks; the weights that stay were moved" in shown
    ran = crdiff("verify", "o.safetensors", "--base", base.path)
    assert ran.code == 0
    assert "every byte but the pruned layers' against" in ran.out
    assert "obs has moved weights: the target weights that stay cannot be checked without --calibration" in ran.err


def doubtful(base: Base, path: Path) -> tuple[Path, str]:
    """The base's calibration with the grams of two layers that ask for more damping, and the first of these."""
    found, digests = (
        dict(base.statistics),
        json.loads(makers.metadata_of(base.calibration)["crdiff.calibration.layers"]),
    )
    first, other = [base.name(piece) for piece in base.slices()][3:5]
    for name, off in ((first, 1.5), (other, 1.05)):
        gram = np.full_like(found[name]["gram"], off)
        np.fill_diagonal(gram, 1)
        found[name] = {**found[name], "gram": gram}
    return masking.write_calibration(path, found, digests, "sd15"), first


def test_the_command_line_tells_of_raised_damping(crdiff: Crdiff, bases: Callable[..., Base], here: Path) -> None:
    """Once, beside what was known before, and every time the same."""
    base = bases(UNET)
    calibration, first = doubtful(base, here / "384.safetensors")
    args = ("export", base.path, "--res", "384x640", "--ratio", "0.3", "-o", "o.safetensors", "--criterion", "obs",
            "--calibration", calibration, "--force")  # fmt: skip
    layers = len(base.slices())
    note = f"obs: damping was raised for 2 of {layers} layers, to at most 1 ({first} and 1 more)"
    ran = crdiff(*args)
    assert ran.code == 0
    assert ran.err.count(f"note: {note}\n") == ran.err.count("damping") == 1
    assert ran.err.index("note: 384.safetensors was made at 512x512") < ran.err.index(note)
    for _ in range(2):
        *known, told = crdiff(*args, "--json").result["notes"]
        assert told == note
        assert known == crdiff(*args, "--dry-run", "--json").result["notes"]
        assert [text for text in known if "was made at 512x512" in text]
    assert "damping" not in crdiff(*args, "-q").err
    good = [text if text != calibration else base.calibration for text in args]
    assert "damping" not in crdiff(*good).err


def test_several_variants_have_notes_of_their_own(bases: Callable[..., Base], tmp_path: Path) -> None:
    base = bases(UNET)
    calibration, first = doubtful(base, tmp_path / "c.safetensors")
    sets = (
        {"down": 0.3, "mid": 0.3, "up": 0.3},
        {"down": 0.0, "mid": 0.3, "up": 0.0},
        {"down": 0.3, "mid": 0, "up": 0},
    )
    jobs = [
        prepare(base.request(tmp_path / f"{i}.safetensors", "obs:compensate=off", ratios=r, calibration=calibration))
        for i, r in enumerate(sets)
    ]
    made = [one.notes for one in run_together(jobs, Silent()) if isinstance(one, Baked)]
    down = sum(piece.group == "down" for piece in base.slices())
    said = "obs: damping was raised for 2 of {} layers, to at most 1 ({} and 1 more)"
    assert made == [(said.format(len(base.slices()), first),), (), (said.format(down, first),)]


def test_a_plan_file_tells_it_too(crdiff: Crdiff, bases: Callable[..., Base], here: Path) -> None:
    base = bases(UNET)
    calibration, first = doubtful(base, here / "c.safetensors")
    (here / "plan.toml").write_text(
        f'repo = "a/b"\nname = "{{size}}.safetensors"\ncriterion = "obs"\ncalibration = "{calibration}"\n'
        f'[[base]]\nbase = "{base.path}"\nsizes = ["512", "384x640"]\n'
    )
    note = f"obs: damping was raised for 2 of {len(base.slices())} layers, to at most 1 ({first} and 1 more)"
    ran = crdiff("publish", "plan.toml", "--no-push", "--json")
    assert ran.code == 0, ran.err
    for one in ran.result["variants"]:
        assert one["status"] == "written"
        assert [text for text in one["notes"] if "damping" in text] == [note]
    found = make_worklist(PublishRequest(here / "plan.toml", here / "out", push=False), lambda: nullcontext(Silent()))
    (here / "out").mkdir()
    outcomes = list(publish(found, Silent()))
    assert [one.status for one in outcomes] == ["written", "written"]
    told = [f"512x512 of base.safetensors: {note}"]
    assert list(report.done_notes(found, outcomes)) == list(report.done_notes(found, outcomes[::-1])) == told


# Weights of doubles.


def test_doubles_have_no_calibration(crdiff: Crdiff, bases: Callable[..., Base], here: Path) -> None:
    base = bases(UNET)
    double = makers.write(here / "double.safetensors", makers.tiny(UNET, "F64"))
    name = base.slices()[0].tensor
    args = ("export", double, "--res", "512", "--ratio", "0.3", "-o", "o.safetensors", "--json")
    calibrated = ("--criterion", "wanda", "--calibration", base.calibration)
    for given, what in (((), "cannot be pruned"), (("--dtype", "fp32"), "is not calibrated")):
        for dry in ((), ("--dry-run",)):
            ran = crdiff(*args, *calibrated, *given, *dry)
            assert (ran.code, ran.error["message"]) == (1, f"{double}: {name!r} is F64, which {what}")
            assert "calibrate and export that" in ran.error["hint"]
    for criterion in ("magnitude", "random"):
        ran = crdiff(*args, "--criterion", criterion)
        assert (ran.code, ran.error["message"]) == (1, f"{double}: {name!r} is F64, which cannot be pruned")
        assert ran.error["hint"].endswith("--dtype casts it.")
    assert not (here / "o.safetensors").exists()


@pytest.mark.parametrize("criterion", ["magnitude", "random:seed=3"])
def test_doubles_are_pruned_after_a_cast(
    criterion: str, crdiff: Crdiff, bases: Callable[..., Base], here: Path
) -> None:
    base, made = bases(UNET), makers.tiny(UNET, "F64")
    double = makers.write(here / "double.safetensors", made)
    ratios = [text for group, ratio in base.ratios.items() for text in (f"--{group}", str(ratio))]
    args = ("--res", "512", *ratios, "-o", "o.safetensors", "--dtype", "fp32", "--criterion", criterion)
    assert crdiff("export", double, *args).code == 0
    source: makers.Tensors = {
        name: ("F32", shape, np.frombuffer(data, "<f8").astype("<f4").tobytes())
        if kind == "F64"
        else (kind, shape, data)
        for name, (kind, shape, data) in made.items()
    }
    if criterion == "magnitude":
        content = {name: data for name, (_, _, data) in oracle.read(here / "o.safetensors").tensors().items()}
        assert content == oracle.expect([source], base.ratios, base.kinds).files[0]
    else:
        hold(base, here / "o.safetensors", criterion, [source])
    ran = crdiff("verify", "o.safetensors", "--base", double)
    assert (ran.code, "every byte against" in ran.out) == (0, True)


def test_a_third_party_may_decide(bases: Callable[..., Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    (tmp_path / "of_a_third_party.py").write_text(
        "class Backwards:\n    statistics = ()\n    def score(self, layer):\n        return -layer.weight.abs()\n"
        "def backwards(options):\n    return Backwards()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint("backwards", "of_a_third_party:backwards", "crdiff.criteria")
    monkeypatch.setattr("crdiff_export.prune.criteria.spec.entry_points", lambda group: [entry])
    base = bases(UNET)
    made = export(base.request(tmp_path / "out.safetensors", "backwards", calibration=None))
    assert makers.metadata_of(made.written.path)["crdiff.criterion"] == "backwards"
    assert check(made.written.path, base.path).against == "all"
    weights = masking.weights(base, [oracle.read(made.written.path).tensors()])
    dense = masking.weights(base, base.files)
    down = [i for i, piece in enumerate(base.slices()) if piece.group == "down"]
    gone = np.concatenate([np.abs(dense[i][(weights[i] == 0) & (dense[i] != 0)]) for i in down])
    stays = np.concatenate([np.abs(dense[i][weights[i] != 0]) for i in down])
    assert gone.min() >= stays.max()


RAISING = """
class Raising:
    statistics = ()
    def __init__(self, options):
        if "make" in options:
            raise OSError("no table")
    def score(self, layer):
        raise ValueError("boom")

class Odd(Raising):
    def score(self, layer):
        return 1
"""


@pytest.mark.parametrize(
    ("criterion", "key"),
    [("Raising", "ValueError: boom"), ("Raising:make=1", "OSError: no table"), ("Odd", "AttributeError: ")],
)
def test_a_third_party_that_raises_is_an_error_of_one_line(
    criterion: str, key: str, bases: Callable[..., Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.metadata import EntryPoint

    name = criterion.partition(":")[0]
    (tmp_path / "raising_party.py").write_text(RAISING)
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint(name, f"raising_party:{name}", "crdiff.criteria")
    monkeypatch.setattr("crdiff_export.prune.criteria.spec.entry_points", lambda group: [entry])
    with raises(CriterionError, name, key) as error:
        export(bases(UNET).request(tmp_path / "out.safetensors", criterion, calibration=None))
    assert "--debug" in error.value.hint
    assert not (tmp_path / "out.safetensors").exists()
