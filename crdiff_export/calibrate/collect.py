"""What layers see while the pipeline draws: sums over all tokens of their inputs, streaming, in bounded memory."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from crdiff_export.calibrate.setting import LayerSpec, Pass, Setting, step_weight
from crdiff_export.errors import CalibrationError
from crdiff_export.progress import Progress
from crdiff_export.sampling.session import Session

# Tokens that are widened at once, which bounds what a sum takes beside its result.
ROWS = 4096


def sample(
    opened: Session,
    setting: Setting,
    step: Pass,
    layers: Sequence[LayerSpec],
    modules: Mapping[str, nn.Linear],
    progress: Progress,
) -> dict[str, Tensor]:
    """The statistics of a group of layers, `<statistic>/<layer>`, from drawing every pair at the pass's size.

    `norm`, float64 [in]: sum of x_j ** 2 over all tokens, steps and pictures (arXiv 2306.11695: ||X_j||_2 squared).
    `gram`, float32 [in, in]: sum of alpha_i * X_i^T X_i, X_i [tokens, in] the input at step i, alpha of `step_weight`.
    Both prompts of classifier-free guidance count, as sampled. CalibrationError for a layer that never ran.
    """
    style = opened.style(step.size, setting.steps, setting.guidance, setting.negative)
    sums = {layer.name: _Sums(layer, step.statistics, modules[layer.name]) for layer in layers}
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress.advance(count)

    def hook(own: _Sums) -> "object":
        def before(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            own.add(args[0], step_weight(done, opened.pipe.num_timesteps))

        return before

    with contextlib.ExitStack() as stack:
        stack.enter_context(_exact_products())
        for name, own in sums.items():
            stack.callback(modules[name].register_forward_pre_hook(hook(own)).remove)  # type: ignore[arg-type]
        for start in range(0, len(setting.pairs), setting.batch):
            pairs = setting.pairs[start : start + setting.batch]
            done, count = 0, len(pairs)
            opened.draw([prompt for prompt, _ in pairs], [seed for _, seed in pairs], style, advance)
    silent = next((name for name, own in sums.items() if not own.tokens), None)
    if silent is not None:
        raise CalibrationError(f"{silent}: the pipeline never runs this layer", "Leave its kind out with --targets.")
    return {f"{statistic}/{name}": found for name, own in sums.items() for statistic, found in own.found.items()}


class _Sums:
    """The sums of one layer, where its weight is."""

    def __init__(self, layer: LayerSpec, statistics: Sequence[str], module: nn.Linear) -> None:
        self.tokens = 0
        # float64 is not everywhere (MPS); the sum is small and may be on the CPU.
        self._wide = module.weight.device if module.weight.device.type != "mps" else torch.device("cpu")
        where = {"norm": (self._wide, torch.float64), "gram": (module.weight.device, torch.float32)}
        self.found = {
            name: torch.zeros(layer.shape(name), device=where[name][0], dtype=where[name][1]) for name in statistics
        }

    def add(self, inputs: Tensor, weight: float) -> None:
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        self.tokens += len(rows)
        for piece in torch.split(rows, ROWS):
            if "norm" in self.found:
                self.found["norm"] += piece.to(self._wide).double().square().sum(dim=0)
            if "gram" in self.found:
                wide = piece.float()
                self.found["gram"].addmm_(wide.T, wide, alpha=weight)


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Products of float32 in float32, whatever was allowed for speed."""
    usual = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(usual)
