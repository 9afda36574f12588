"""The thumbnail of a baked file: one picture of the pruned model, drawn before the file is written."""

import io
from typing import Final

from crdiff_export.bake.modelspec import Thumbnail
from crdiff_export.errors import OptionError
from crdiff_export.evaluate.comparison import PRUNED, Renderer
from crdiff_export.export import ExportJob
from crdiff_export.formats.text import printable
from crdiff_export.progress import Progress
from crdiff_export.prune.plan import recognise
from crdiff_export.sampling import drawing_setup, poa, request_checks
from crdiff_export.sampling.drawing_setup import BaseHeaders, DrawingSetup
from crdiff_export.sampling.request_checks import DrawingRequest

# ModelSpec 1.0.1: a thumbnail is a JPEG of 256x256 pixels.
SIDE: Final = 256
SEED: Final = 0


def prepare(job: ExportJob, prompt: str) -> DrawingSetup:
    """Check that a thumbnail can be drawn, before a weight is read.

    Args:
        job: The planned export.
        prompt: What the picture is to show.

    Returns:
        How it will be drawn.

    Raises:
        OptionError: The export has a cast.
        CrdiffError: diffusers cannot draw with the base.
    """
    request_checks.check_texts([prompt])
    if job.plan.cast:
        raise OptionError("a thumbnail is drawn from the base's own dtype", "Leave out --thumbnail or --dtype.")
    checkpoint, match = job.plan.checkpoint.on_disk, job.plan.match
    if job.plan.checkpoint.origin:
        match = recognise(checkpoint, match.family if match.family.table else None)
    headers = BaseHeaders(job.base, checkpoint, match)
    return drawing_setup.set_up(_drawing_request(job), headers, job.plan)


def draw(job: ExportJob, setup: DrawingSetup, prompt: str, progress: Progress) -> Thumbnail:
    """Draw the thumbnail of an export.

    Args:
        job: The planned export.
        setup: What `prepare` returned.
        prompt: What the picture is to show.
        progress: Is told how far the work is.

    Returns:
        The picture, cut to a square around its middle.

    Raises:
        CrdiffError: The weights cannot be read, or the pipeline cannot be opened.
    """
    from PIL import Image, ImageOps

    from crdiff_export.sampling.session import Placement, open_session

    source = poa.from_recipe(job.request, progress)
    size = job.plan.size
    placement = Placement(setup.device, setup.dtype, threads=setup.opening.pipeline.threads)
    with open_session(setup.opening, placement, setup.base.name) as session:
        renderer = Renderer(session, _drawing_request(job), progress)
        renderer.start(1, [PRUNED], size)
        with poa.enabled(session.pipe, source, PRUNED):
            ((_, (image,), _),) = renderer.draw([(prompt, SEED)], size, PRUNED)
    square = ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    square.save(stream, format="JPEG", quality=90)
    text = printable(prompt, 300)
    origin = f"{text}; seed {SEED}, the pruned model at {size}, drawn on {setup.device} in {setup.dtype}"
    return Thumbnail(stream.getvalue(), origin)


def _drawing_request(job: ExportJob) -> DrawingRequest:
    request = job.request
    return DrawingRequest(request.base, device=request.device, variant=request.variant, family=request.family)
