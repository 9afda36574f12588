"""Export beside what a user would do otherwise: `python benchmarks/export.py` (about 25 GB of disk, 17 GB of memory).

It makes a checkpoint of SDXL's geometry with random weights (or takes one: `--file`), then runs, in turn and paired,
`cp`, `crdiff export` with and without hashes, and the public code's way with torch (load all, concatenate, kthvalue,
mask, save). It prints medians of the ratios to the `cp` of the same round, peak memory, and the machine.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
RATIO = "0.3"
# Takes a source and an output as its last arguments.
COPY_AND_SYNC = ("sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh")


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one way: seconds of wall clock and of processor, and the peak of resident memory in MB."""

    seconds: float
    cpu: float
    peak: float


def measure(command: Sequence[str], stdout: int = subprocess.DEVNULL) -> Run:
    """Run a command as a process of its own."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=stdout)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"failed with {process.returncode}: {' '.join(command)}")
    scale = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return Run(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / scale)


def ways(source: Path, output: Path, *, naive: bool) -> dict[str, list[str]]:
    """What to compare, by name."""
    crdiff = [sys.executable, "-m", "crdiff_export", "export", str(source), "--res", "512", "--ratio", RATIO]
    crdiff += ["-o", str(output), "--force", "--quiet"]
    found = {
        "cp": ["cp", str(source), str(output)],
        "cp, then sync": [*COPY_AND_SYNC, str(source), str(output)],
        "crdiff export": crdiff,
        "crdiff export --no-hash": [*crdiff, "--no-hash"],
    }
    if naive:
        found["load, kthvalue, save"] = [sys.executable, str(HERE / "naive.py"), str(source), str(output), RATIO]
    return found


def machine() -> str:
    """The machine, in words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.processor()}, {cores} cores, {memory:.0f} GiB, {platform.system()}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="a checkpoint to use instead of a made one")
    parser.add_argument("--table", default="sdxl.original", help="the geometry to make (tests/support/geometry)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--naive-rounds", type=int, default=1, help="rounds that also run the torch way; 0 for none")
    parser.add_argument("--json", action="store_true", help="all figures as JSON")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="crdiff-benchmark-", dir=args.folder))
    try:
        source = args.file or make(folder / "base.safetensors", args.table)
        found = compare(source, folder / "out.safetensors", args.rounds, args.naive_rounds)
        show(source, found, as_json=args.json)
    finally:
        shutil.rmtree(folder)


def make(path: Path, table: str) -> Path:
    """A checkpoint of real geometry with random weights."""
    print(f"making {table} …", file=sys.stderr)
    subprocess.run([sys.executable, HERE / "make_checkpoint.py", table, path], check=True)
    return path


def drop(path: Path) -> None:
    """Take a file out of the system's cache."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(source: Path, output: Path, rounds: int, naive_rounds: int) -> dict[str, list[Run]]:
    """Every way once in each round, after one round that warms up and is not counted."""
    found: dict[str, list[Run]] = {}
    for number in range(-1, rounds):
        for name, command in ways(source, output, naive=0 <= number < naive_rounds).items():
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr)
            run = measure(command)
            output.unlink()
            if number >= 0:
                found.setdefault(name, []).append(run)
    return found


def show(source: Path, found: dict[str, list[Run]], *, as_json: bool) -> None:
    """The table, or everything for machines."""
    size = source.stat().st_size
    if as_json:
        figures = {name: [[r.seconds, r.cpu, r.peak] for r in runs] for name, runs in found.items()}
        print(json.dumps({"machine": machine(), "bytes": size, "runs": figures}))
        return
    print(f"{machine()}; {size / 1e9:.2f} GB; {time.strftime('%Y-%m-%d')}\n")
    print("| way | median time | ratio to cp (min to max) | processor time | peak memory |")
    print("|---|---|---|---|---|")
    for name, runs in found.items():
        ratios = [run.seconds / copy.seconds for run, copy in zip(runs, found["cp"], strict=False)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        seconds, cpu = (statistics.median(values) for values in zip(*((r.seconds, r.cpu) for r in runs), strict=True))
        print(f"| {name} | {seconds:.1f} s | {spread} | {cpu:.1f} s | {max(r.peak for r in runs):.0f} MB |")


if __name__ == "__main__":
    main()
