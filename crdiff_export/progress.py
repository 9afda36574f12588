"""The protocol by which a long job reports how far it is. The core calls it; the command line shows it."""

from typing import Final, Protocol

# Ours: the rate of a stage that ends sooner, in seconds, tells nothing.
SHORTEST: Final = 0.1


class Progress(Protocol):
    """A watcher of a job that goes through stages of a known size."""

    def stage(self, title: str, size: int, unit: str = "bytes") -> None:
        """Begin a stage, which ends the one before it.

        Args:
            title: What is done in it, such as `counting`.
            size: How much there is to do; 0 for a stage that is not worth showing.
            unit: What `size` counts.

        """
        ...

    def advance(self, size: int) -> None:
        """Report that `size` more of the stage is done. Any thread may call it."""
        ...


class Silent:
    """A progress that shows nothing."""

    def stage(self, title: str, size: int, unit: str = "bytes") -> None:
        pass

    def advance(self, size: int) -> None:
        pass
