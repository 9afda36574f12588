"""Several variants of one base: `python benchmarks/publish.py` (about 40 GB of disk).

It makes a checkpoint of SDXL's geometry with random weights (or takes one: `--file`), then runs, in turn and paired:
the disk alone (read the base once, write it k times, unbuffered, synced), `crdiff publish --no-push` for k sizes, the
same variants one by one (as `--keep none` does), and k separate exports. The base is dropped from the system's cache
before each. It prints medians of the ratios to the disk alone in the same round, peak memory, and the machine.
"""

import argparse
import json
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from export import Run, drop, machine, make, measure

from crdiff_export import ExportRequest, Size
from crdiff_export.export import prepare, prepare_located, run_in_turn
from crdiff_export.progress import Silent

SIZES = ("512x512", "768x768", "1536x1536", "2048x2048", "400x560", "1024x1536", "1536x1024", "640x640")
RATIOS = (0.3, 0.25, 0.2, 0.4, 0.35, 0.15, 0.1, 0.45)
CHUNK = 8 << 20


def disk(source: Path, folder: Path, count: int) -> None:
    """Read a file once and write it so many times, past the system's cache, with one buffer and one thread."""
    size = source.stat().st_size
    buffer = memoryview(mmap.mmap(-1, CHUNK))
    direct = getattr(os, "O_DIRECT", 0)
    handle = os.open(source, os.O_RDONLY | direct)
    while os.readv(handle, [buffer]) > 0:
        pass
    os.close(handle)
    for number in range(count):
        handle = os.open(folder / f"{number}.safetensors", os.O_WRONLY | os.O_CREAT | direct)
        for _ in range(0, size, CHUNK):
            os.write(handle, buffer)
        os.ftruncate(handle, size)
        os.fsync(handle)
        os.close(handle)


def one_by_one(source: Path, folder: Path, count: int) -> None:
    """The variants of the plan, counted once and written one after the other."""
    requests = [
        ExportRequest(str(source), Size.parse(size), folder / f"{number}.safetensors", ratio=ratio)
        for number, (size, ratio) in enumerate(zip(SIZES[:count], RATIOS, strict=False))
    ]
    first = prepare(requests[0])
    others = [prepare_located(request, first.criterion, first.base, first.plan.checkpoint) for request in requests[1:]]
    jobs = [first, *others]
    list(run_in_turn(jobs, Silent()))


def plan_file(source: Path, folder: Path, count: int) -> Path:
    """A plan for so many variants of a base."""
    lines = ["[[base]]", f"base = {json.dumps(str(source))}", 'name = "{size}.safetensors"']
    for size, ratio in zip(SIZES[:count], RATIOS, strict=False):
        lines += ["[[base.variant]]", f'size = "{size}"', f"ratio = {ratio}"]
    path = folder / "plan.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def ways(source: Path, folder: Path, count: int) -> dict[str, list[str]]:
    """What to compare, by name."""
    own = [sys.executable, __file__, "--count", str(count), "--file", str(source), "--folder", str(folder / "out")]
    plan = plan_file(source, folder, count)
    crdiff = [sys.executable, "-m", "crdiff_export"]
    each = " && ".join(
        " ".join([*crdiff, f"export {source} --res {size} --ratio {ratio} -o {folder}/out/{size}.safetensors -q"])
        for size, ratio in zip(SIZES[:count], RATIOS, strict=False)
    )
    return {
        f"the disk alone: 1 read, {count} writes": [*own, "--disk"],
        f"crdiff publish, {count} variants": [*crdiff, "publish", str(plan), "--no-push", "-q", "-o", f"{folder}/out"],
        "the same one by one": [*own, "--one-by-one"],
        f"{count} times crdiff export": ["sh", "-c", each],
    }


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="a checkpoint to use instead of a made one")
    parser.add_argument("--table", default="sdxl.original", help="the geometry to make (tests/support/geometry)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--count", type=int, default=4, help="how many variants")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--disk", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one-by-one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.disk or args.one_by_one:
        (disk if args.disk else one_by_one)(args.file, args.folder, args.count)
        return
    folder = Path(tempfile.mkdtemp(prefix="crdiff-benchmark-", dir=args.folder))
    try:
        source = (args.file or make(folder / "base.safetensors", args.table)).resolve()
        show(source, compare(source, folder, args.count, args.rounds))
    finally:
        shutil.rmtree(folder)


def compare(source: Path, folder: Path, count: int, rounds: int) -> dict[str, list[Run]]:
    """Every way once in each round."""
    found: dict[str, list[Run]] = {}
    for number in range(rounds):
        for name, command in ways(source, folder, count).items():
            (folder / "out").mkdir()
            drop(source)
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr)
            found.setdefault(name, []).append(measure(command))
            shutil.rmtree(folder / "out")
    return found


def show(source: Path, found: dict[str, list[Run]]) -> None:
    """The table."""
    print(f"{machine()}; {source.stat().st_size / 1e9:.2f} GB; {time.strftime('%Y-%m-%d')}\n")
    print("| way | median time | ratio to the disk alone (min to max) | processor time | peak memory |")
    print("|---|---|---|---|---|")
    alone = next(iter(found.values()))
    for name, runs in found.items():
        ratios = [run.seconds / other.seconds for run, other in zip(runs, alone, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        seconds, cpu = (statistics.median(values) for values in zip(*((r.seconds, r.cpu) for r in runs), strict=True))
        print(f"| {name} | {seconds:.1f} s | {spread} | {cpu:.1f} s | {max(r.peak for r in runs):.0f} MB |")


if __name__ == "__main__":
    main()
