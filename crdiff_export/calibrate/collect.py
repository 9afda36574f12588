"""Collect sums over the inputs of layers while the pipeline draws, in bounded memory."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from crdiff_export.calibrate.setting import LayerSpec, Pass, Setting, step_weight
from crdiff_export.errors import CalibrationError
from crdiff_export.progress import Progress
from crdiff_export.sampling.session import Session

# Tokens that are widened at once, which bounds the memory beside the result.
ROWS = 4096


def sample(
    opened: Session,
    setting: Setting,
    step: Pass,
    layers: Sequence[LayerSpec],
    modules: Mapping[str, nn.Linear],
    progress: Progress,
) -> dict[str, Tensor]:
    """Draw every pair at the size of the pass, and collect the statistics of a group of layers.

    `norm`, float64 [in]: sum of x_j ** 2 over all tokens, steps and pictures (arXiv 2306.11695: ||X_j||_2 squared).
    `gram`, float32 [in, in]: sum of alpha_i * X_i^T X_i, X_i [tokens, in] the input at step i, alpha of `step_weight`.
    Both prompts of classifier-free guidance count.

    Args:
        opened: The open pipeline.
        setting: The settings of the calibration.
        step: The pass.
        layers: The group of layers.
        modules: The pipeline's module of each layer, by name.
        progress: Told of every sampling step.

    Returns:
        The tensors `<statistic>/<layer>`.

    Raises:
        CalibrationError: The pipeline never runs one of the layers.
    """
    style = opened.style(step.size, setting.steps, setting.guidance, setting.negative)
    sums = {layer.name: _Sums(layer, step.statistics, modules[layer.name]) for layer in layers}
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress.advance(count)

    def hook(sum_of_layer: _Sums) -> "object":
        def before(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            sum_of_layer.add(args[0], step_weight(done, len(opened.pipe.scheduler.timesteps)))

        return before

    with contextlib.ExitStack() as stack:
        stack.enter_context(_exact_products())
        for name, layer_sums in sums.items():
            stack.callback(modules[name].register_forward_pre_hook(hook(layer_sums)).remove)  # type: ignore[arg-type]
        for start in range(0, len(setting.pairs), setting.batch):
            pairs = setting.pairs[start : start + setting.batch]
            done, count = 0, len(pairs)
            opened.draw([prompt for prompt, _ in pairs], [seed for _, seed in pairs], style, advance)
    silent = next((name for name, layer_sums in sums.items() if not layer_sums.tokens), None)
    if silent is not None:
        raise CalibrationError(f"{silent}: the pipeline never runs this layer", "Leave its kind out with --targets.")
    return {f"{statistic}/{name}": total for name, of in sums.items() for statistic, total in of.totals.items()}


class _Sums:
    """The sums of one layer, on the device of its weight."""

    def __init__(self, layer: LayerSpec, statistics: Sequence[str], module: nn.Linear) -> None:
        self.tokens = 0
        # MPS has no float64; the sum is small, so it may be on the CPU.
        self._wide = module.weight.device if module.weight.device.type != "mps" else torch.device("cpu")
        where = {"norm": (self._wide, torch.float64), "gram": (module.weight.device, torch.float32)}
        self.totals = {
            name: torch.zeros(layer.shape(name), device=where[name][0], dtype=where[name][1]) for name in statistics
        }

    def add(self, inputs: Tensor, weight: float) -> None:
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        self.tokens += len(rows)
        for piece in torch.split(rows, ROWS):
            if "norm" in self.totals:
                self.totals["norm"] += piece.to(self._wide).double().square().sum(dim=0)
            if "gram" in self.totals:
                wide = piece.float()
                self.totals["gram"].addmm_(wide.T, wide, alpha=weight)


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Compute products of float32 in float32, whatever is allowed for speed."""
    usual = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(usual)
