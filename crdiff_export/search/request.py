"""The request of a search, as a command line or a Python call gives it."""

from dataclasses import dataclass
from pathlib import Path

from crdiff_export.errors import OptionError
from crdiff_export.models import recipe
from crdiff_export.prune import criterion_choice
from crdiff_export.prune.criteria.spec import Spec
from crdiff_export.sampling import request_checks
from crdiff_export.sampling.request_checks import DrawingRequest
from crdiff_export.search.anneal import SEED
from crdiff_export.search.methods import MethodName
from crdiff_export.sizes import Size


@dataclass(frozen=True, slots=True)
class SearchRequest(DrawingRequest):
    """A wish for good ratios: of which base, for which size, by which scorer, on which prompts.

    The search judges by `prompts`, or by many pictures of one `prompt`. The check takes `held_out`; without them a
    third of the prompts is kept for it. `noise` is the seed of the first picture; all others count up from it.
    `trials` are those of all workers together, `hours` those of this one. A `worker` only works on the search.
    Pages show `command`, the command line that made them.
    """

    size: Size
    scorer: str | None = None
    prompts: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    prompt: str | None = None
    limit: int | None = None
    held_out_limit: int | None = None
    pictures: int | None = None
    noise: int = 0
    method: MethodName | None = None
    seed: int = SEED
    trials: int | None = None
    hours: float | None = None
    low: float | None = None
    high: float | None = None
    paper: bool = False
    poa: bool = False
    poa_range: tuple[float, float] | None = None
    early_stop: bool = True
    recipe: Path | None = None
    targets: tuple[str, ...] | None = None
    criterion: str = criterion_choice.MAGNITUDE
    calibration: Path | None = None
    native: bool = True
    batch: int | None = None
    scorer_device: str | None = None
    storage: str | None = None
    study: str | None = None
    worker: bool = False
    outputs: tuple[Path, ...] = ()
    sheet: Path | None = None
    force: bool = False
    rehash: bool = False
    command: str = ""


def check_request(request: SearchRequest) -> None:
    """Refuse what the request alone shows to be impossible."""
    if request.noise < 0 or request.seed < 0:
        raise OptionError("a seed is negative", "Count from 0.")
    counts = (request.limit, request.held_out_limit, request.pictures, request.batch, request.trials)
    if any(count is not None and count < 1 for count in counts):
        raise OptionError("there is nothing to draw", "Ask for one picture and one prompt at least.")
    if request.paper and (
        request.method not in (None, "anneal") or request.low is not None or request.high is not None
    ):
        raise OptionError("--paper has its own method and range", "Leave out --method, --low and --high, or --paper.")
    if request.poa_range and request.poa_range[0] <= 0:
        raise OptionError("a POA weight of 0 is the dense model", "Begin the --poa-range above 0, as in 1 2.5.")
    texts = (*request.prompts, *request.held_out, *((request.prompt,) if request.prompt is not None else ()))
    request_checks.check(request, texts)
    if Spec.parse(request.criterion).name == criterion_choice.UNIFORM:
        hint = "Leave --criterion out, and compare with it in `crdiff evaluate`, or search one of the others."
        raise OptionError("a search finds a ratio for each group, uniform has one for all", hint)
    for weight in request.poa_range or ():
        recipe.check_poa_weight("the POA weight", weight)
