"""The evaluation that several tests share, and command lines written as in a shell."""

from collections.abc import Callable

from crdiff_export import Size
from crdiff_export.evaluate import EvaluateRequest
from tests.support.isolation import Ran

Line = Callable[[str], Ran]
# Eight prompts at two sizes, the second of which is the native one, by three models.
REQUEST = EvaluateRequest("demo", (Size(48, 48), Size(64, 64)), limit=8, ratio=0.4, steps=2, batch=8, weights=(1.5,))
