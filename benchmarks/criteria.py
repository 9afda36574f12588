"""What each criterion costs: `python benchmarks/criteria.py FOLDER [--res 512 --res 1024 --device cuda]`.

FOLDER is a diffusers folder, such as one of random_sdxl.py, or `demo`. For each criterion and size: the seconds that
`crdiff calibrate` takes with few prompts, steps and samples (they add up, so that more cost accordingly), the memory
of the device and the size of the file; then the seconds in which an export decides by it what goes.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from crdiff_export import Size
from crdiff_export.calibrate import CalibrateRequest, calibrate
from crdiff_export.errors import CrdiffError
from crdiff_export.export import ExportRequest, plan_variant
from crdiff_export.hub import bases
from crdiff_export.progress import Silent
from crdiff_export.prune import kernels
from crdiff_export.prune.criterion_choice import CriterionChoice
from crdiff_export.prune.ranking import rank

CALIBRATED = ("wanda", "taylor", "adverse", "obs")
FREE = ("magnitude", "random")


class Stages(Silent):
    """The seconds of each stage of some work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._began = "", time.perf_counter()

    def stage(self, name: str, total: int, unit: str = "B") -> None:
        self._end()
        self._name, self._began = name, time.perf_counter()

    def _end(self) -> None:
        if self._name:
            spent = time.perf_counter() - self._began
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + spent

    def told(self) -> str:
        self._end()
        self._name = ""
        return ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())


def peak(device: str) -> float:
    """GB that torch has held on the device, or that the process has had in memory, since it was last asked."""
    if not device.startswith("cuda"):
        if not (status := Path("/proc/self/status")).exists():
            return float("nan")
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        return int(line.split()[1]) * 1024 / 1e9
    found = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return found


def decide(base: str, size: Size, spec: str, calibration: Path | None, device: str) -> float:
    """Seconds for what goes, of all targets at 0.3."""
    request = ExportRequest(base, size, ratio=0.3, criterion=spec, calibration=calibration)
    criterion = CriterionChoice.of(spec, calibration)
    plan = plan_variant(request, bases.locate(base).open(None), criterion)
    began = time.perf_counter()
    rank(criterion, [plan], kernels.load("cpu"), Silent(), device).decide(plan)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("base")
    parser.add_argument("--res", type=Size.parse, action="append")
    parser.add_argument("--criterion", action="append", choices=(*FREE, *CALIBRATED))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="default: as crdiff calibrate")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--no-decide", action="store_true", help="only calibrate")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    print(f"{name}; {args.prompts} prompts, {args.steps} steps, {args.samples} samples of a picture", flush=True)
    texts = () if args.base == "demo" else tuple("abcdefgh"[: args.prompts])
    for size in args.res or [Size(512, 512)]:
        for spec in args.criterion or (*FREE, *CALIBRATED):
            with tempfile.TemporaryDirectory() as folder:
                path, stages, held = Path(folder) / "c.safetensors", Stages(), 0.0
                began = time.perf_counter()
                try:
                    if spec in CALIBRATED:
                        calibrate(
                            CalibrateRequest(
                                args.base, size, (spec,), path, prompts=texts, limit=args.prompts, steps=args.steps,
                                samples=args.samples, device=args.device, dtype=args.dtype,
                            ),
                            stages,
                        )  # fmt: skip
                        held = peak(args.device)
                        took = time.perf_counter() - began
                        print(
                            f"{size} {spec}: calibrated in {took:.1f} s ({stages.told()}), {held:.1f} GB held, "
                            f"file {path.stat().st_size / 1e9:.2f} GB",
                            flush=True,
                        )
                    if not args.no_decide:
                        took = decide(args.base, size, spec, path if spec in CALIBRATED else None, args.device)
                        print(f"{size} {spec}: decided in {took:.1f} s, {peak(args.device):.1f} GB", flush=True)
                except CrdiffError as error:
                    print(f"{size} {spec}: {error}", flush=True)


if __name__ == "__main__":
    main()
