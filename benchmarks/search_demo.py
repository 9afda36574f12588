"""Search the demo model's sizes and make its recipe: `python benchmarks/search_demo.py OUT [--device cuda --jobs 12]`.

For every size two searches by `crdiff search`, from the paper's starting point: one judges the pruned model alone, one
searches the POA weight as well. The one whose best trial scores higher on the search's own prompts gives the size its
variant; where that search recommends nothing, because the dense model is best or its check shows worse, the size keeps
the starting point. Then `crdiff evaluate` measures all of them on the held-out prompts, from other noise than the
checks', and writes the recipe that ships; a POA weight that was worse than the dense model there becomes 1.
A run that was stopped goes on where it was.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from crdiff_export.models import recipe_files, recipe_toml
from crdiff_export.models.recipe import Recipe, Variant
from crdiff_export.sizes import Size

SIZES = ("48x48", "56x56", "80x80", "96x96", "96x64", "64x96")
WAYS = ("alone", "poa")
STARTING = {"down": 0.3, "mid": 0.3, "up": 0.3}
START_WEIGHT = 1.5
SOURCE = "search start of the CR-Diff public code: 0.3/0.3/0.3, POA weight 1.5; nobody tuned this size"
# All prompts that were kept for searching, and for measuring (crdiff_export/evaluation/prompts.py).
PROMPTS, HELD_OUT = 84, 162


def command(size: str, way: str, out: Path, args: argparse.Namespace) -> list[str]:
    """One search."""
    words = [
        sys.executable, "-m", "crdiff_export", "search", "demo", "--res", size, "--limit", str(PROMPTS),
        "--held-out-limit", str(HELD_OUT), "--trials", str(args.trials), "--batch", str(args.batch), "--dtype", "fp32",
        "--device", args.device, "--json", "--force", "--recipe", str(out / "start.toml"),
        "-o", str(out / f"{size}-{way}.toml"),
        "-o", str(out / f"{size}-{way}.png"), "--pictures-of-best", str(out / f"{size}-{way}-sheet.png"),
    ]  # fmt: skip
    words += ["--poa"] if way == "poa" else []
    return words + (["--hours", str(args.hours)] if args.hours else [])


def search(size: str, way: str, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What a search says of itself."""
    ran = subprocess.run(command(size, way, out, args), capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{size} {way}: {ran.stderr}")
    (out / f"{size}-{way}.json").write_text(ran.stdout)
    found: dict[str, Any] = json.loads(ran.stdout)
    print(f"{size} {way}: {len(found['trials'])} trials; {found['conclusion']}", flush=True)
    return found


def best(found: dict[str, Any]) -> float:
    """The score of a search's best trial, on its own prompts."""
    return float(next(trial["score"] for trial in found["trials"] if trial["place"] == found["best"]))


def start() -> Recipe:
    """The starting point of the paper's search, for every size."""
    known = recipe_files.by_alias("demo")
    assert known
    variants = (Variant(Size.parse(size), STARTING, START_WEIGHT, "starting-point", SOURCE) for size in SIZES)
    return replace(known, variants=tuple(variants), name="")


def settled(path: Path) -> None:
    """Recommend no POA weight that was worse than the dense model."""
    made = recipe_files.load(path)
    path.write_text(recipe_toml.dump(replace(made, variants=tuple(map(_without_worse, made.variants)), name="")))


def _without_worse(variant: Variant) -> Variant:
    evidence = variant.evidence
    if evidence is None or float(evidence.extra.get("poa_high", 0)) >= 0:
        return variant
    extra = {key: value for key, value in evidence.extra.items() if key not in ("poa", "poa_low", "poa_high")}
    source = f"{variant.source}; POA weight 1, as {variant.poa_weight:g} was worse than the dense model"
    return replace(variant, poa_weight=1.0, source=source, evidence=replace(evidence, extra=extra))


def merged(out: Path) -> Recipe:
    """The demo recipe with every size's better search."""
    known = start()
    return replace(known, variants=tuple(_variant(size, out, known) for size in SIZES), name="")


def _variant(size: str, out: Path, known: Recipe) -> Variant:
    found = [json.loads((out / f"{size}-{way}.json").read_text()) for way in WAYS]
    _, way = max((best(one), way) for one, way in zip(found, WAYS, strict=True))
    path = out / f"{size}-{way}.toml"
    if path.exists():
        return recipe_files.load(path).variants[0]
    return next(variant for variant in known.variants if variant.resolution == Size.parse(size))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=28, help="a third of the prompts: three looks at a trial")
    parser.add_argument("--trials", type=int, default=120)
    parser.add_argument("--hours", type=float, help="of each search, at most")
    parser.add_argument("--jobs", type=int, default=1, help="searches at once")
    parser.add_argument("--merge", action="store_true", help="only make the recipe of what was searched")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "start.toml").write_text(recipe_toml.dump(start()))
    if not args.merge:
        with ThreadPoolExecutor(args.jobs) as pool:
            each = [pool.submit(search, size, way, args.out, args) for size in SIZES for way in WAYS]
            for one in each:
                one.result()
    path = args.out / "searched.toml"
    path.write_text(recipe_toml.dump(merged(args.out)))
    sizes = [word for size in SIZES for word in ("--res", size)]
    subprocess.run(
        [
            sys.executable, "-m", "crdiff_export", "evaluate", "demo", "--recipe", str(path), *sizes, "--limit",
            str(HELD_OUT), "--device", args.device, "--dtype", "fp32", "--batch", "81", "--force",
            "-o", str(args.out / "demo.toml"), "-o", str(args.out / "sizes.png"), "-o", str(args.out / "sizes.html"),
        ],
        check=True,
    )  # fmt: skip
    settled(args.out / "demo.toml")


if __name__ == "__main__":
    main()
