"""What tests of command lines share beside their fixtures."""

from collections.abc import Callable

from tests.support.isolation import Ran

# Runs a command line as one would type it.
Line = Callable[[str], Ran]
UNTUNED = (
    "starting point, not tuned (search start of the CR-Diff public code: 0.3/0.3/0.3, POA weight 1.5; "
    "nobody tuned this size)"
)
