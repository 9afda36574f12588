"""Exports and packs beside the disk and the processor: `python benchmarks/disk.py` (about 45 GB of disk).

It makes a checkpoint of SDXL's geometry with random weights (or takes one: `--file`, `--table` for a smaller one), then
runs, in rounds whose order rotates:

- `cp` and a sync of the copy;
- D, the disk alone: the base read once and written once, unbuffered, by a reader and a writer that work at the same
  time, with `fsync` at the end; D4 is the same with four outputs;
- H, the processor alone: one SHA-256 of as many bytes as the base has, from memory, on one core;
- `crdiff export` whose cache of hashes is empty, the same with the base's hash remembered, and four sizes in one
  export with an empty cache;
- `crdiff pack create` for ten sizes with an empty cache, and a plain export from such a pack, the hash remembered.

The base is not in the system's cache when a way begins; `mincore` checks it. Ratios are of the same round, and
compared with the goals. Linux only.
"""

import argparse
import ctypes
import hashlib
import json
import mmap
import os
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

# The peak memory of a process begins with that of its parent, so this program loads nothing large.
from export import COPY_AND_SYNC, HERE, RATIO, Run, drop, machine, make, measure

CHUNK = 8 << 20
BUFFERS = 4
HASHED = 1 << 30
SIZES = (
    "512x512", "768x1024", "1536x1536", "2048x2048", "400x560", "640x640", "1024x1536", "1536x1024", "768x768",
    "1920x1080",
)  # fmt: skip
# A younger file's hash is not remembered, so the base has to be this many seconds old.
YOUNG = 4

COPY, D, D4, H = "cp, then sync", "D: 1 read, 1 write", "D4: 1 read, 4 writes", "H: one SHA-256"
FIRST, SECOND, FOUR = "export, first", "export, second", "export, four sizes"
PACK, FROM_PACK = "pack create, ten sizes", "export from a pack"


@dataclass(frozen=True, slots=True)
class Folders:
    """Where everything is: outputs of a run in `out`, caches of crdiff without and with the base's hash, a pack."""

    out: Path
    empty: Path
    remembered: Path
    pack: Path

    @classmethod
    def below(cls, folder: Path) -> "Folders":
        return cls(folder / "out", folder / "empty", folder / "remembered", folder / "base.crdiff")


@dataclass(frozen=True, slots=True)
class Goal:
    """A limit for a ratio to the disk or the processor, or for memory in MB.

    `measured` computes it from the runs of one round.
    """

    name: str
    limit: float
    measured: Callable[[dict[str, Run]], float]


GOALS = (
    Goal("first / max(D, 1.5 H)", 1.3, lambda r: r[FIRST].seconds / max(r[D].seconds, 1.5 * r[H].seconds)),
    Goal("second / max(D, H)", 1.1, lambda r: r[SECOND].seconds / max(r[D].seconds, r[H].seconds)),
    Goal("four sizes / D4", 1.15, lambda r: r[FOUR].seconds / r[D4].seconds),
    Goal("memory of exports, MB", 260, lambda r: max(r[way].peak for way in (FIRST, SECOND, FOUR, FROM_PACK))),
)


def copy_unbuffered(source: Path, outputs: Sequence[Path]) -> None:
    """Read a file once and write it to every output, past the system's cache, and wait for the disk."""
    free, full = queue.Queue[memoryview](), queue.Queue[tuple[memoryview, int] | None]()
    for _ in range(BUFFERS):
        free.put(memoryview(mmap.mmap(-1, CHUNK)))  # starts on a page, as unbuffered access needs
    handles = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT) for path in outputs]

    def read() -> None:
        handle = os.open(source, os.O_RDONLY | os.O_DIRECT)
        try:
            while size := os.readv(handle, [buffer := free.get()]):
                full.put((buffer, size))
        finally:
            full.put(None)
            os.close(handle)

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        while item := full.get():
            buffer, size = item
            pages = buffer[: size + -size % mmap.PAGESIZE]
            for handle in handles:
                if os.write(handle, pages) != len(pages):
                    sys.exit("a short write; is the disk full?")
            free.put(buffer)
        reading.result()
    for handle in handles:
        os.ftruncate(handle, source.stat().st_size)
        os.fsync(handle)
        os.close(handle)


def hash_memory(size: int) -> float:
    """Hash so many bytes of one buffer, again and again; return the seconds without those of filling it."""
    buffer = memoryview(os.urandom(CHUNK) * (HASHED // CHUNK))
    began, digest = time.perf_counter(), hashlib.sha256()
    for start in range(0, size, HASHED):
        digest.update(buffer[: size - start])
    return time.perf_counter() - began


def run_alone(way: str, source: Path, folder: Path) -> None:
    """Run the disk or the processor alone, and print its seconds."""
    began = time.perf_counter()
    if way == "hash":
        print(hash_memory(source.stat().st_size))
        return
    outputs = [folder / f"{number}.safetensors" for number in range(4 if way == "disk4" else 1)]
    copy_unbuffered(source, outputs)
    print(time.perf_counter() - began)


def cached_bytes(path: Path) -> int:
    """Count the bytes of a file that are in the system's cache (mincore(2))."""
    size = path.stat().st_size
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        call = ctypes.CDLL(None, use_errno=True).mincore
        call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        failed = call(ctypes.addressof(first), size, pages)
        del first  # else the mapping cannot be closed
    if failed:
        sys.exit(f"{path}: mincore: {os.strerror(ctypes.get_errno())}")
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def crdiff(cache: Path, *args: str | Path) -> list[str]:
    """A command of crdiff with its cache in a folder."""
    start = ["env", f"XDG_CACHE_HOME={cache}", sys.executable, "-m", "crdiff_export"]
    return [*start, *map(str, args), "--quiet"]


def sizes(count: int) -> list[str]:
    """Options for so many sizes."""
    return [word for size in SIZES[:count] for word in ("--res", size)]


def ways(source: Path, folders: Folders) -> dict[str, list[str]]:
    """What to compare, by name."""
    out, ratio = folders.out, ("--ratio", RATIO)
    alone = [sys.executable, __file__, "--file", str(source), "--folder", str(out), "--alone"]
    output = ("-o", out / "{size}.safetensors")
    return {
        COPY: [*COPY_AND_SYNC, str(source), str(out / "copy.safetensors")],
        D: [*alone, "disk"],
        D4: [*alone, "disk4"],
        H: [*alone, "hash"],
        FIRST: crdiff(folders.empty, "export", source, *sizes(1), *ratio, *output),
        SECOND: crdiff(folders.remembered, "export", source, *sizes(1), *ratio, *output),
        FOUR: crdiff(folders.empty, "export", source, *sizes(4), *ratio, *output),
        PACK: crdiff(folders.empty, "pack", "create", source, *sizes(10), *ratio, "-o", out / "base.crdiff"),
        FROM_PACK: crdiff(folders.remembered, "export", source, *sizes(1), "--pack", folders.pack, *output),
    }


def run(command: list[str]) -> Run:
    """Run a way; of the disk and the processor alone count the seconds that they print, without Python's start."""
    if "--alone" not in command:
        return measure(command)
    with tempfile.TemporaryFile("w+") as output:
        whole = measure(command, stdout=output.fileno())
        output.seek(0)
        return Run(float(output.read()), whole.cpu, whole.peak)


def prepare(source: Path, folders: Folders) -> None:
    """Make the pack, remember the base's hash, and compile the loops, so that no run that counts has to."""
    time.sleep(YOUNG)
    folders.out.mkdir()
    made = crdiff(folders.remembered, "pack", "create", source, *sizes(10), "--ratio", RATIO, "-o", folders.pack)
    for command in (made, ways(source, folders)[SECOND]):
        measure(command)
    if not list(folders.remembered.glob("crdiff/hashes/*.json")):
        sys.exit("The hash of the base is not remembered; is it the base of another user, or a clock that is off?")
    shutil.rmtree(folders.out)
    shutil.copytree(folders.remembered, folders.empty)


def compare(source: Path, folders: Folders, rounds: int) -> list[dict[str, Run]]:
    """Every way once in each round, in an order that rotates, each with the base out of the system's cache."""
    commands = list(ways(source, folders).items())
    done: list[dict[str, Run]] = []
    for number in range(rounds):
        shift = number * len(commands) // rounds
        done.append({})
        for name, command in commands[shift:] + commands[:shift]:
            shutil.rmtree(folders.empty / "crdiff", ignore_errors=True)
            folders.out.mkdir()
            os.sync()
            drop(source)
            if cached := cached_bytes(source):
                sys.exit(f"{source}: {cached / 1e6:.0f} MB stay in the system's cache; does another program use it?")
            done[-1][name] = run(command)
            print(f"round {number + 1} of {rounds}: {name}: {done[-1][name].seconds:.2f} s", file=sys.stderr)
            shutil.rmtree(folders.out)
    return done


def check_room(folder: Path, table: str, file: Path | None) -> None:
    """End with an error unless the disk has room for four outputs, and for the base if it has to be made."""
    size, files = (file.stat().st_size, 4) if file else (size_of(table, folder), 5)
    needed, free = files * size * 1.15, shutil.disk_usage(folder).free
    if free < needed:
        sys.exit(f"{folder}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed. Name another disk with --folder.")


def size_of(table: str, folder: Path) -> int:
    """The bytes of a geometry's checkpoint, from a file that is a hole."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary, "hole.safetensors")
        subprocess.run([sys.executable, HERE / "make_checkpoint.py", table, path, "--sparse"], check=True)
        return path.stat().st_size


def main() -> None:
    """Measure, print tables as plain text, and write the figures as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="a checkpoint to use instead of a made one")
    parser.add_argument("--table", default="sdxl.original", help="the geometry to make (tests/support/geometry)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures")
    parser.add_argument("--alone", choices=("disk", "disk4", "hash"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not hasattr(os, "O_DIRECT") or not hasattr(os, "posix_fadvise"):
        sys.exit("This needs unbuffered reads and writes (O_DIRECT), which only Linux has.")
    if args.alone:
        run_alone(args.alone, args.file, args.folder)
        return
    check_room(args.folder, args.table, args.file)
    folder = Path(tempfile.mkdtemp(prefix="crdiff-benchmark-", dir=args.folder))
    try:
        source = (args.file or make(folder / "base.safetensors", args.table)).resolve()
        folders = Folders.below(folder)
        prepare(source, folders)
        rounds = compare(source, folders, args.rounds)
        size, pack = source.stat().st_size, folders.pack.stat().st_size
    finally:
        shutil.rmtree(folder)
    show(size, pack, rounds)
    if args.json:
        args.json.write_text(json.dumps(figures(size, pack, rounds), indent=1) + "\n")


def show(size: int, pack: int, rounds: list[dict[str, Run]]) -> None:
    """The tables: seconds of every way, and ratios beside the goals."""
    print(f"{machine()}; {time.strftime('%Y-%m-%d')}")
    print(f"Base: {size / 1e9:.2f} GB, not in the system's cache before each way. Rounds: {len(rounds)}.")
    print(f"Pack of {len(SIZES)} sizes: {pack} bytes.\n")
    print(f"{'':24}{'seconds':>8}{'(min to max)':>18}{'CPU s':>9}{'memory MB':>12}")
    for name in rounds[0]:
        runs = [done[name] for done in rounds]
        cpu, peak = statistics.median(r.cpu for r in runs), max(r.peak for r in runs)
        print(f"{name:24}{spread([r.seconds for r in runs])}{cpu:>9.1f}{peak:>12.0f}")
    print(f"\n{'':24}{'ratio':>8}{'(min to max)':>18}{'goal':>9}")
    for goal in GOALS:
        values = [goal.measured(done) for done in rounds]
        result = "met" if statistics.median(values) <= goal.limit else "missed"
        print(f"{goal.name:24}{spread(values)}{goal.limit:>9g}{result:>12}")


def spread(values: Sequence[float]) -> str:
    """The median, the least and the largest of some values, in 26 columns."""
    digits = 0 if min(values) >= 100 else 2
    middle, low, high = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle:>8}{f'({low} to {high})':>18}"


def figures(size: int, pack: int, rounds: list[dict[str, Run]]) -> dict[str, object]:
    """Everything for machines: seconds, processor time and memory of every run, and every round's ratios."""
    return {
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "bytes": size,
        "base_cached": False,
        "pack_bytes": pack,
        "runs": {name: [asdict(done[name]) for done in rounds] for name in rounds[0]},
        "goals": {g.name: {"limit": g.limit, "values": [g.measured(done) for done in rounds]} for g in GOALS},
    }


if __name__ == "__main__":
    main()
