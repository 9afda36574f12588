"""`crdiff publish`, with the Hub's real client in processes of their own: what it publishes, what it leaves alone."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from crdiff_export import Size
from crdiff_export.models import recipe_files
from tests.support import hub_runs, makers, masking
from tests.support.forks import Forks
from tests.support.loopback_hub import READ_TOKEN, LoopbackHub
from tests.support.publishing import BASE, CARD, Desk, checkpoint, plan, statuses

SIZES = ("48x48", "64x96", "96x64", "96x96", "80x80")  # those of the demo's recipe
EXPORTS = """\
import json, sys
from crdiff_export.cli import main
for args in json.loads(sys.argv[1]):
    try:
        main([*args, "-q"])
    except SystemExit as end:
        assert end.code == 0, args
"""


def commands(desk: Desk, *args: list[str]) -> None:
    """Other commands of crdiff, in one process."""
    environment = hub_runs.environment(desk.hub, desk.tmp / "home", client=desk.client)
    script = [sys.executable, "-P", "-c", EXPORTS, json.dumps(args)]
    subprocess.run(script, cwd=desk.folder, env=environment, check=True)


def below(files: Iterator[str] | Any, path: str) -> set[str]:
    return {name for name in files if name == path or name.startswith(f"{path}/")}


# --- what is published ---

PLAN = """\
sizes = ["96x64", "48x48"]
repo = "tester/{base}-pruned"

[[base]]
base = "hf://org/single/model.safetensors"
dtype = "bf16"

[[base]]
base = "org/pipe"
repo = "tester/pipes"
name = "ä b/100%25 #1 {size} (1) 'x' +"

[[base]]
base = "hf://org/pipe"
weights = "fp16"
repo = "tester/pipes"
revision = "half"

[[base]]
base = "org/sharded"
sizes = ["96x64"]
repo = "tester/pipes"

[[base]]
base = "hf://org/shards/model.safetensors.index.json"
sizes = ["48x48"]
repo = "tester/pipes"

[[base]]
base = "models/local.safetensors"
repo = "studio/{width}-wide"
base_model = "org/single"

[[base.variant]]
size = "80x80"
ratios = { down = 0.1, up = 0.5 }
poa_weight = 2.5
targets = ["attn"]

[[base]]
base = "demo"
repo = "studio/48-wide"
sizes = ["48x48"]
"""
# Repository, branch, path, and what `crdiff export` is given for the same.
PUBLISHED: list[tuple[str, str, str, list[str]]] = [
    *(
        ("tester/model-pruned", "main", f"model-crdiff-{size}.safetensors",
         ["hf://org/single/model.safetensors", "--res", size, "--dtype", "bf16"])
        for size in ("96x64", "48x48")
    ),
    *(
        ("tester/pipes", "main", f"ä b/100%25 #1 {size} (1) 'x' +", ["org/pipe", "--res", size])
        for size in ("96x64", "48x48")
    ),
    *(
        ("tester/pipes", "half", f"pipe-crdiff-{size}", ["org/pipe", "--res", size, "--variant", "fp16"])
        for size in ("96x64", "48x48")
    ),
    ("tester/pipes", "main", "sharded-crdiff-96x64", ["org/sharded", "--res", "96x64"]),
    ("tester/pipes", "main", "model-crdiff-48x48",
     ["hf://org/shards/model.safetensors.index.json", "--res", "48"]),
    *(
        (f"studio/{size[:2]}-wide", "main", f"local-crdiff-{size}.safetensors",
         ["models/local.safetensors", "--res", size])
        for size in ("96x64", "48x48")
    ),
    ("studio/80-wide", "main", "local-crdiff-80x80.safetensors",
     ["models/local.safetensors", "--res", "80", "--down", "0.1", "--up", "0.5", "--poa-weight", "2.5",
      "--targets", "attn"]),
    ("studio/48-wide", "main", "demo-crdiff-48x48.safetensors", ["demo", "--res", "48"]),
]  # fmt: skip


def shelves(desk: Desk) -> None:
    """The bases of PLAN."""
    desk.base("org/single")
    pipe, sharded = desk.tmp / "pipe", desk.tmp / "sharded"
    (pipe / "unet").mkdir(parents=True)
    makers.write(pipe / "unet/diffusion_pytorch_model.safetensors", makers.tiny("demo.diffusers-unet"))
    makers.write(pipe / "unet/diffusion_pytorch_model.fp16.safetensors", makers.tiny("demo.diffusers-unet", seed=1))
    makers.write_shards(sharded / "unet", makers.tiny("demo.diffusers-unet", seed=2), 3)
    makers.write_shards(desk.tmp / "shards", makers.tiny("demo.original-unet", seed=4), 2, stem="model")
    shards = {path.name: path for path in (desk.tmp / "shards").iterdir()}
    desk.hub.add_repo("org/shards", {**shards, "README.md": CARD})
    for folder, repo in ((pipe, "org/pipe"), (sharded, "org/sharded")):
        (folder / "unet/config.json").write_text("{}")
        (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
        (folder / "README.md").write_bytes(CARD)
        files = [path for path in folder.rglob("*") if path.is_file()]
        desk.hub.add_repo(repo, {path.relative_to(folder).as_posix(): path for path in files})
    (desk.folder / "models").mkdir()
    (desk.folder / "models/local.safetensors").write_bytes(checkpoint(3))


def test_many_bases_sizes_and_places(desk: Desk, loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    shelves(desk)
    desk.plan(PLAN)
    ran = desk.publish("--json", "-o", "out")
    assert (ran.code, ran.err) == (0, "")
    made = ran.result["variants"]
    assert [(one["repo"], one["revision"], one["path"]) for one in made] == [place[:3] for place in PUBLISHED]
    assert {one["status"] for one in made} == {"published"}
    commits = Counter((repo, revision) for repo, revision, _, _ in PUBLISHED)
    for repo, revision in commits:
        paths = [path for *place, path, _ in PUBLISHED if place == [repo, revision]]
        assert desk.titles(repo, revision)[::-1] == [f"Publish {path} with crdiff" for path in paths]
        card = desk.hub.read(repo, "README.md", revision).decode()
        assert all(path in card for path in paths)
    exports = [
        [*args, "-o", f"{tmp_path}/exports/{number}{'.safetensors' if path.endswith('.safetensors') else ''}"]
        for number, (_, _, path, args) in enumerate(PUBLISHED)
    ]
    (tmp_path / "exports").mkdir()
    commands(desk, *(["export", *args] for args in exports), *(["verify", one["output"]] for one in made))
    for one, (repo, revision, path, args), (*_, exported) in zip(made, PUBLISHED, exports, strict=True):
        published = {
            name: desk.hub.read(repo, name, revision) for name in below(loopback_hub.repo(repo).files(revision), path)
        }
        assert files(desk.folder / one["output"], path) == published
        alone = files(Path(exported), path)
        if "--down" in args:
            assert_but_given(published[path], alone[path], tmp_path)
        else:
            assert published == alone
        if len(published) == 1:
            assert (one["sha256"], one["bytes"]) == (sha256(published[path]).hexdigest(), len(published[path]))
    before = {repo: loopback_hub.repo(repo).refs for repo, _ in commits}
    assert set(desk.made("-o", "out").values()) == {"unchanged"}
    assert desk.changes() == []
    assert {repo: loopback_hub.repo(repo).refs for repo, _ in commits} == before


def files(local: Path, path: str) -> dict[str, bytes]:
    """A file, or all files of a folder, by their names if they stood at `path`."""
    if local.is_file():
        return {path: local.read_bytes()}
    found = (file for file in local.rglob("*") if file.is_file())
    return {f"{path}/{file.relative_to(local).as_posix()}": file.read_bytes() for file in found}


def assert_but_given(published: bytes, alone: bytes, tmp_path: Path) -> None:
    """Numbers of one's own are said to be given in the plan file, or on the command line, and all else is the same."""
    found = []
    for name, data in (("published", published), ("alone", alone)):
        (tmp_path / name).write_bytes(data)
        found.append((makers.metadata_of(tmp_path / name), makers.read(tmp_path / name)))
    (ours, tensors), (theirs, others) = found
    assert tensors == others
    given = ours.pop("crdiff.provenance.source"), theirs.pop("crdiff.provenance.source")
    assert given == ("given in the plan file", "given on the command line")
    assert ours == theirs


def test_xet(xet_hub: LoopbackHub, tmp_path: Path, clients: Forks) -> None:
    """From and to a Hub whose large files are on Xet."""
    desk = Desk(xet_hub, tmp_path, clients)
    base = desk.base(xet=True)
    desk.plan(plan("48x48", "96x64"))
    assert set(desk.made(xet=True).values()) == {"published"}
    assert desk.downloads() == []
    assert xet_hub.uploads == []
    for size in ("48x48", "96x64"):
        path = desk.folder / f"{size}.safetensors"
        assert desk.hub.read("tester/out", path.name) == path.read_bytes()
        assert makers.metadata_of(path)["crdiff.source.file_sha256"] == f"0x{sha256(base).hexdigest()}"
    assert set(desk.made(xet=True).values()) == {"unchanged"}


def test_a_base_that_is_replaced_in_between(desk: Desk) -> None:
    """What was looked at is what is fetched; the next run finds the other."""
    old = desk.base()
    desk.plan(plan("48x48"))
    commit = desk.hub.repo("org/base").branches["main"]
    desk.hub.before("GET .*/auth-check", lambda: desk.hub.commit("org/base", {"model.safetensors": checkpoint(1)}))
    assert desk.made() == {"48x48.safetensors": "published"}
    assert all(f"/resolve/{commit}/" in path for path in desk.downloads())
    said = makers.metadata_of(desk.folder / "48x48.safetensors")
    assert said["crdiff.source.file_sha256"] == f"0x{sha256(old).hexdigest()}"
    assert desk.made() == {"48x48.safetensors": "published"}
    assert desk.made() == {"48x48.safetensors": "unchanged"}


def test_a_cached_base_needs_no_hub(desk: Desk) -> None:
    desk.base()
    desk.plan(plan("48x48"))
    assert desk.export(BASE, "-o", "other.safetensors").code == 0
    offline = {"HF_HUB_OFFLINE": "1"}
    assert desk.made("--no-push", env=offline) == {"48x48.safetensors": "written"}
    assert desk.made("--no-push", env=offline) == {"48x48.safetensors": "unchanged"}
    assert desk.made(env=offline, code=4) == {"48x48.safetensors": "failed"}
    assert desk.hub.requests == []


# --- what is left alone ---


@pytest.mark.parametrize("client", hub_runs.CLIENTS)
def test_what_is_there_costs_some_headers(client: hub_runs.Client, desk: Desk) -> None:
    desk.client = client
    desk.base()
    desk.plan(plan(*(f"{64 + 8 * number}x64" for number in range(4))))
    assert set(desk.made("--keep", "none").values()) == {"published"}
    assert len(desk.downloads()) == 1
    ran = desk.publish(token=READ_TOKEN)
    assert ran.code == 0
    assert ran.out.count(" unchanged ") == 4
    assert ran.err == ""
    assert desk.changes() == desk.downloads("") == []
    assert all(asked.method == "GET" for asked in desk.hub.requests)
    assert len(desk.hub.requests) == 9  # a repository and its tree, twice, and 5 headers
    assert desk.files() == set()


CHANGES = {
    "ratio": ("ratio = 0.4", "changed: ratio.down, ratio.mid, ratio.up"),
    "ratios": ("ratios = { down = 0.3, mid = 0.3, up = 0.6 }", "changed: ratio.up"),
    "poa": ("ratio = 0.3\npoa_weight = 2", "changed: poa.weight"),
    "targets": ('ratio = 0.3\ntargets = ["attn"]', "changed: targets"),
    "recipe": ('ratio = 0.3\nrecipe = "own.toml"', "changed: recipe"),
    "dtype": ('ratio = 0.3\ndtype = "bf16"', "changed: cast"),
    "size": None,
    "same": None,
    "0.30": ("ratios = { mid = 0.3, down = 3e-1, up = 0.30 }", "unchanged"),
}


def changing(desk: Desk, *, changed: bool) -> str:
    """A plan with a variant for every kind of change."""
    text = 'repo = "tester/out"\n[[base]]\nbase = "hf://org/base/model.safetensors"\n'
    for name, change in CHANGES.items():
        size = "96x64" if name == "size" and changed else "48x48"
        said = change[0] if change and changed else "ratio = 0.3"
        text += f'[[base.variant]]\nsize = "{size}"\nname = "{name}.safetensors"\n{said}\n'
    text += '[[base]]\nbase = "org/replaced"\nsizes = ["48x48"]\nname = "replaced.safetensors"\n'
    text += '[[base]]\nbase = "org/touched"\nsizes = ["48x48"]\nname = "touched.safetensors"\n'
    if changed:
        text += '[[base]]\nbase = "org/touched"\nsizes = ["96x64"]\nname = "more.safetensors"\n'
    return text


def test_only_what_changed_is_made_again(desk: Desk) -> None:
    for repo in ("org/base", "org/replaced", "org/touched"):
        desk.base(repo)
    shutil.copy(recipe_files.builtin_path() / "demo.toml", desk.folder / "own.toml")
    desk.plan(changing(desk, changed=False))
    assert set(desk.made("--keep", "none").values()) == {"published"}
    before = desk.titles("tester/out")

    desk.plan(changing(desk, changed=True))
    new = checkpoint(1)
    desk.hub.commit("org/replaced", {"model.safetensors": new})
    desk.hub.commit("org/touched", {"README.md": CARD + b"More.\n", "picture.png": b"\0" * 600})
    expected = {f"{name}.safetensors": change[1] for name, change in CHANGES.items() if change} | {
        "size.safetensors": "changed: recipe, resolution.target",
        "same.safetensors": "unchanged",
        "replaced.safetensors": "changed: source.file_sha256",
        "touched.safetensors": "unchanged",
        "more.safetensors": "new",
    }
    told = desk.publish("--dry-run", "--json").result["variants"]
    assert {one["path"]: one["reason"] for one in told} == expected
    assert {one["path"]: one["action"] for one in told} == {
        path: "skip" if reason == "unchanged" else "make" for path, reason in expected.items()
    }
    same = {path: desk.hub.read("tester/out", path) for path, reason in expected.items() if reason == "unchanged"}
    assert desk.made("--keep", "none") == {
        path: "unchanged" if reason == "unchanged" else "published" for path, reason in expected.items()
    }
    made = [f"Publish {path} with crdiff" for path, reason in expected.items() if reason != "unchanged"]
    assert sorted(desk.titles()[: -len(before)]) == sorted(made)
    assert {path: desk.hub.read("tester/out", path) for path in same} == same
    assert set(desk.made("--keep", "none").values()) == {"unchanged"}


ALIAS = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def test_another_criterion_makes_it_again(desk: Desk) -> None:
    """However it is spelt; one that lacks its calibration is a problem of the plan."""
    desk.base()
    sizes = ("96x64", "48x48")
    desk.plan(plan(*sizes, more='criterion = "random:seed=7"'))
    assert set(desk.made().values()) == {"published"}
    desk.plan(plan(*sizes, more='criterion = "random:seed=7,compare=block"'))
    assert set(desk.made().values()) == {"unchanged"}
    desk.plan(plan(*sizes, more='criterion = "random"'))
    ran = desk.publish("--dry-run", "--json")
    assert [one["reason"] for one in ran.result["variants"]] == ["changed: criterion"] * 2
    assert [one["criterion"] for one in ran.result["variants"]] == ["random"] * 2
    mixed = plan(*sizes, each='[[base.variant]]\nsize = "64x96"\ncriterion = "wanda"\nname = "wanda.safetensors"')
    desk.plan(mixed)
    ran = desk.publish("--json")
    assert (ran.code, ran.error["code"]) == (1, "plan-file")
    (problem,) = ran.error["problems"]
    assert "criterion: wanda needs a calibration" in problem["message"]


def test_a_calibration_decides_what_is_there(desk: Desk) -> None:
    """Its path begins at the plan, and its content counts."""
    made = masking.base(desk.tmp / "made", "demo.original-unet", size=Size(96, 64))
    desk.hub.add_repo("org/base", {"model.safetensors": made.path.read_bytes(), "README.md": CARD})
    own = desk.folder / "plans" / "own.safetensors"
    text = plan("96x64", more='criterion = "wanda"\ncalibration = "own.safetensors"')
    name = desk.plan(text, "plans/plan.toml")
    ran = desk.publish(name, "--json")
    assert ran.code == 1
    assert "but there is no such file" in ran.error["problems"][0]["message"]
    shutil.copy(made.calibration, own)
    assert desk.made(name) == {"96x64.safetensors": "published"}
    assert desk.made(name) == {"96x64.safetensors": "unchanged"}
    raw = bytearray(own.read_bytes())
    raw[-1] ^= 1  # of a gradient, which Wanda does not look at
    own.write_bytes(raw)
    ran = desk.publish(name, "--dry-run")
    assert "changed: calibration.file_sha256" in ran.out
    assert ", wanda" in ran.out
    assert desk.made(name) == {"96x64.safetensors": "published"}
    assert b"wanda, calibrated at 96x64" in desk.hub.read("tester/out", "README.md")


def test_nothing_else_makes_it_again(desk: Desk) -> None:
    """Another name or place of the plan, comments, another folder, another name of the base, another crdiff."""
    tensors = makers.tiny("sd15.original")
    data = makers.header(tensors) + b"".join(part for _, _, part in tensors.values())
    desk.hub.add_repo(ALIAS, {"v1-5-pruned-emaonly.safetensors": data, "README.md": CARD})
    desk.plan(plan("512", "400x560", "480x360", base="sd15"))
    assert set(desk.made("--keep", "none").values()) == {"published"}
    newer = desk.tmp / "newer/crdiff_export-99.dist-info"
    newer.mkdir(parents=True)
    (newer / "METADATA").write_text("Metadata-Version: 2.1\nName: crdiff-export\nVersion: 99\n")
    again = "# A comment.\n" + plan("400x560", base=f"hf://{ALIAS}/v1-5-pruned-emaonly.safetensors", each="# Another.")
    again += f'[[base]]\nbase = "{ALIAS}@main"\nsizes = ["512"]\n[[base]]\nbase = "sd15"\nsizes = ["480x360"]\n'
    desk.plan(again, "plans/other name.toml")
    ran = desk.publish("plans/other name.toml", "-o", "elsewhere", "--json", env={"PYTHONPATH": str(newer.parent)})
    assert statuses(ran.result) == dict.fromkeys(
        ["400x560.safetensors", "512x512.safetensors", "480x360.safetensors"], "unchanged"
    )
    assert desk.changes() == desk.downloads("") == []
    assert desk.files() == {"plans"}


def test_two_at_once(desk: Desk) -> None:
    """Each of two runs sees what the other has committed in the meantime."""
    desk.base()
    desk.plan(plan("48x48", "96x64", "96x96"))
    place = desk.hub, desk.tmp / "home", desk.folder, "publish", "plan.toml"
    runs = [hub_runs.start(*place, "-o", folder, "--json") for folder in ("one", "two")]
    ended = [hub_runs.finish(run) for run in runs]
    assert [ran.code for ran in ended] == [0, 0]
    assert sorted(desk.titles("tester/out")) == sorted(
        f"Publish {size}.safetensors with crdiff" for size in ("48x48", "96x64", "96x96")
    )
    one, other = (statuses(ran.result) for ran in ended)
    assert all("published" in (one[path], other[path]) for path in one)


def test_one_that_somebody_else_publishes_in_between(desk: Desk) -> None:
    desk.base()
    desk.hub.add_repo("tester/out")
    desk.plan(plan("48x48"))
    assert desk.made("--no-push") == {"48x48.safetensors": "written"}
    data = (desk.folder / "48x48.safetensors").read_bytes()
    desk.hub.before("GET .*/auth-check", lambda: desk.hub.commit("tester/out", {"48x48.safetensors": data}))
    ran = desk.publish()
    assert (ran.code, ran.out.splitlines()[1].split()[2]) == (0, "unchanged")
    assert "sending" not in ran.err
    assert len(desk.titles("tester/out")) == 1


def test_a_foreign_file_beside_what_is_there_is_no_matter(desk: Desk) -> None:
    desk.base()
    desk.plan(plan("48x48"))
    assert desk.made("--keep", "none") == {"48x48.safetensors": "published"}
    (desk.folder / "48x48.safetensors").write_bytes(b"mine")
    assert desk.made("--keep", "none") == {"48x48.safetensors": "unchanged"}
    assert (desk.folder / "48x48.safetensors").read_bytes() == b"mine"


def folder_with_variants(desk: Desk) -> None:
    """A pipeline on the Hub, sharded, whose UNet and VAE come in two variants."""
    pipe = desk.tmp / "pipe"
    for variant, seed in (("", 0), ("fp16", 1)):
        makers.write_shards(pipe / "unet", makers.tiny("demo.diffusers-unet", seed=seed), 2, variant=variant)
        (pipe / "vae").mkdir(exist_ok=True)
        name = f"vae/diffusion_pytorch_model{'.fp16' if variant else ''}.safetensors"
        makers.write(pipe / name, {"encoder.down.0.weight": ("F16", (2,), bytes([seed, 1] * 2))})
    for name in ("unet/config.json", "vae/config.json", "model_index.json"):
        (pipe / name).write_text("{}")
    files = [path for path in pipe.rglob("*") if path.is_file()]
    desk.hub.add_repo("org/pipe", {path.relative_to(pipe).as_posix(): path for path in files})
    text = 'repo = "tester/out"\nsizes = ["48x48"]\n[[base]]\nbase = "org/pipe"\nname = "plain"\n'
    desk.plan(text + '[[base]]\nbase = "org/pipe"\nweights = "fp16"\nname = "half"\n')


def test_what_stands_beside_the_weights_counts(desk: Desk) -> None:
    """Variants of a folder do not mix; another VAE in the base is made and pushed anew, not from an earlier run."""
    folder_with_variants(desk)
    assert set(desk.made().values()) == {"published"}
    names = desk.hub.repo("tester/out").files()
    vae = "vae/diffusion_pytorch_model"
    assert below(names, "plain/vae") == {"plain/vae/config.json", f"plain/{vae}.safetensors"}
    assert below(names, "half/vae") == {"half/vae/config.json", f"half/{vae}.fp16.safetensors"}
    variants = desk.publish("--dry-run", "--json").result["variants"]
    assert [(variant["action"], variant["reason"]) for variant in variants] == [("skip", "unchanged")] * 2
    assert desk.downloads("") == []
    new = makers.write(desk.tmp / "new.safetensors", {"encoder.down.0.weight": ("F16", (2,), b"\7\1" * 2)})
    desk.hub.commit("org/pipe", {f"{vae}.safetensors": new})
    assert sorted(desk.made().values()) == ["published", "unchanged"]
    assert desk.hub.read("tester/out", f"plain/{vae}.safetensors") == new.read_bytes()
    # A folder of an earlier run that has lost a file is not sent.
    desk.hub.repositories.pop("tester/out")
    (desk.folder / "plain/vae/config.json").unlink()
    reasons = [variant["reason"] for variant in desk.publish("--dry-run", "--json").result["variants"]]
    assert reasons == ["incomplete", "made by an earlier run"]


def test_what_is_there_in_part_is_made_again(desk: Desk) -> None:
    index = makers.write_shards(desk.folder / "base/unet", makers.tiny("demo.diffusers-unet"), 3)
    (index.parent / "config.json").write_text("{}")
    desk.plan(plan("48x48", base="base").replace("{size}.safetensors", "x"))
    assert desk.made("--keep", "none") == {"x": "published"}
    whole = {name: desk.hub.read("tester/out", name) for name in desk.names() - {"README.md"}}
    assert len(whole) == 5
    for lost in ("diffusion_pytorch_model-00002-of-00003.safetensors", index.name, "config.json"):
        desk.hub.commit("tester/out", {f"x/unet/{lost}": None})
        (one,) = desk.publish("--dry-run", "--json").result["variants"]
        assert (one["action"], one["reason"]) == ("make", "incomplete")
        desk.hub.commit("tester/out", {f"x/unet/{lost}": whole[f"x/unet/{lost}"]})
    assert desk.made("--keep", "none") == {"x": "unchanged"}


def test_what_a_base_is_decides_the_names(desk: Desk) -> None:
    """Its headers are read once for all that one reading can make, and tell whether the result is a folder."""
    folder_with_variants(desk)
    desk.base()
    text = 'sizes = ["48"]\n'
    for base, name, more in (
        ("org/base", "x", ""), ("org/base", "y.safetensors", ""),
        ("org/base", "{base}-f.safetensors", 'dtype = "fp32"'),
        ("org/pipe", "z.safetensors", ""), ("org/pipe", "z", ""), ("org/pipe", None, ""),
    ):  # fmt: skip
        text += f'[[base]]\nbase = "{base}"\n{more}\n' + (f'name = "{name}"\n' if name else "")
    desk.plan(text)
    variants = desk.publish("--dry-run", "--json").result["variants"]
    assert [(one["path"], one["action"]) for one in variants] == [
        ("x", "fail"), ("y.safetensors", "make"), ("base-f.safetensors", "make"),
        ("z.safetensors", "fail"), ("z", "make"), ("pipe-crdiff-48x48", "make"),
    ]  # fmt: skip
    messages = [one["error"]["message"] for one in variants if one["error"]]
    assert [message.partition(":")[0] for message in messages] == ["x", "z.safetensors"]
    assert (desk.count("GET /api/models/org/base/tree/"), desk.count("GET /api/models/org/pipe/tree/")) == (2, 1)


# --- pull requests ---


def test_one_pull_request_for_a_plan(desk: Desk) -> None:
    """A second run continues it; read access to the repository is enough."""
    desk.base()
    repo, token = "org/out", READ_TOKEN
    desk.hub.add_repo(repo, {"x.txt": b"x"})
    desk.plan(plan("48x48", "96x64", repo=repo))
    desk.hub.fail("POST .*/commit/refs%2Fpr%2F1", status=400)
    first = desk.publish("--create-pr", "--json", token=token)
    assert first.code == 4
    assert statuses(first.result) == {"48x48.safetensors": "published", "96x64.safetensors": "failed"}
    desk.plan(plan("48x48", "96x64", "96x96", repo=repo))
    dry = desk.publish("--create-pr", "--dry-run", "--json", token=token).result["variants"]
    assert [(one["action"], one["reason"]) for one in dry] == [
        ("skip", "unchanged"), ("send", "made by an earlier run"), ("make", "new")
    ]  # fmt: skip
    second = desk.publish("--create-pr", "--json", token=token)
    assert second.code == 0
    assert list(statuses(second.result).values()) == ["unchanged", "published", "published"]
    (pull,) = desk.hub.repo(repo).pull_requests
    page = f"{desk.hub.url}/{repo}/discussions/{pull.num}"
    assert {one["pull_request"] for one in [*first.result["variants"], *second.result["variants"]]} == {page, None}
    assert pull.title == "Publish variants with crdiff"
    assert desk.titles(repo, "refs/pr/1")[2::-1] == [
        pull.title,
        *(f"Publish {size}.safetensors with crdiff" for size in ("96x64", "96x96")),
    ]
    assert set(desk.hub.repo(repo).files()) == {".gitattributes", "x.txt"}
    third = desk.publish("--create-pr", "--json", token=token)
    assert set(statuses(third.result).values()) == {"unchanged"}
    assert desk.changes() == []


# --- tags ---


def test_a_tag_is_set_once_all_is_there_and_never_moved(desk: Desk) -> None:
    desk.base()
    text = (
        plan("48x48", "96x64", more='tag = "v1_0"')
        + f'[[base]]\nbase = "{BASE}"\ntag = "other"\nname = "other-{{size}}.safetensors"\n'
    )
    desk.plan(text)
    desk.hub.fail("POST .*/commit/", status=400)
    ran = desk.publish("--json")
    assert ran.code == 4
    tags = {one["tag"]: one for one in ran.result["tags"]}
    assert desk.hub.repo("tester/out").tags == {"other": tags["other"]["commit"]}
    assert tags["v1_0"]["commit"] is None
    assert tags["other"]["commit"] == ran.result["variants"][-1]["commit"]
    ran = desk.publish("--json")
    assert ran.code == 0
    first = desk.hub.repo("tester/out").branches["main"]
    assert desk.hub.repo("tester/out").tags == {"v1_0": first, "other": tags["other"]["commit"]}
    assert {one["tag"]: one["commit"] for one in ran.result["tags"]} == desk.hub.repo("tester/out").tags

    # What others commit is no reason to move it, nor to complain.
    desk.hub.commit("tester/out", {"notes.txt": b"By hand."})
    ran = desk.publish("--json", token=READ_TOKEN)
    assert (ran.code, set(statuses(ran.result).values())) == (0, {"unchanged"})
    assert {one["tag"]: one["commit"] for one in ran.result["tags"]} == desk.hub.repo("tester/out").tags
    assert desk.hub.repo("tester/out").tags["v1_0"] == first

    # But other variants under the name of an old tag are.
    desk.plan(text.replace('sizes = ["48x48"', 'sizes = ["64x96", "48x48"', 1))
    ran = desk.publish("--json")
    assert (ran.code, statuses(ran.result)["64x96.safetensors"]) == (4, "published")
    assert f"the tag v1_0 is at {first[:10]}" in ran.result["tags"][0]["error"]["message"]
    assert desk.hub.repo("tester/out").tags["v1_0"] == first


# --- who may see a repository ---


def test_a_new_repository_is_as_private_as_its_bases(desk: Desk) -> None:
    desk.base("org/open")
    desk.base("org/gated", gated="auto", access=("tester",))
    desk.base("org/closed", gated="manual")
    desk.base("org/other", card=b"---\nlicense: other\n---\n")
    desk.base("org/silent", card=b"# No front matter\n")
    (desk.folder / "local.safetensors").write_bytes(checkpoint())
    hub_file = "hf://org/{}/model.safetensors".format
    repos: dict[str, tuple[list[str], str, bool]] = {
        "open": ([hub_file("open")], "", False),
        "gated": ([hub_file("open"), hub_file("gated")], "", True),
        "other": ([hub_file("other"), hub_file("open")], "", True),
        "silent": ([hub_file("silent")], "", True),
        "closed": ([hub_file("open"), hub_file("closed")], "", True),
        "missing": ([hub_file("open"), hub_file("missing")], "", True),
        "local": (["local.safetensors"], "", True),
        "named": (["local.safetensors"], 'base_model = "org/open"', False),
        "demo": (["demo"], "", True),
        "branches": ([hub_file("open"), hub_file("gated")], 'revision = "{base}-{size}"', True),
        "said": ([hub_file("gated")], "private = false", False),
        "hidden": ([hub_file("open")], "private = true", True),
    }
    text = ""
    for name, (bases, more, _) in repos.items():
        for number, base in enumerate(bases):
            said = more.replace("{base}", str(number))
            text += f'[[base]]\nbase = "{base}"\nsizes = ["48x48"]\n'
            text += f'repo = "tester/{name}"\nname = "{number}.safetensors"\n{said}\n'
    desk.plan(text)
    ran = desk.publish("--keep", "none", "--json")
    assert ran.code == 4
    assert [one["path"] for one in ran.result["variants"] if one["error"]] == ["1.safetensors"] * 2
    assert {name: desk.hub.repo(f"tester/{name}").private for name in repos} == {
        name: private for name, (_, _, private) in repos.items()
    }
    notes = [note for one in ran.result["variants"] for note in one["notes"] if note.startswith("created ")]
    assert len(notes) == len(repos)
    assert any(note.startswith("created tester/branches, private, as its base is gated") for note in notes)
    assert "created tester/open, public" in notes
