"""How a long job tells whoever watches it how far it is. The core calls it; `ui` draws it."""

from typing import Protocol


class Progress(Protocol):
    """A watcher of a job that goes through stages of a known size."""

    def stage(self, title: str, size: int, unit: str = "bytes") -> None:
        """A stage of `size` bytes, or whatever else `unit` names, begins; the one before it is over."""
        ...

    def advance(self, size: int) -> None:
        """`size` more of the stage is done. Called from any thread."""
        ...


class Silent:
    """Nobody watches."""

    def stage(self, title: str, size: int, unit: str = "bytes") -> None:
        """Say nothing."""

    def advance(self, size: int) -> None:
        """Say nothing."""
