"""How a long job tells whoever watches it how far it is. The core calls it; `ui` draws it."""

from typing import Protocol


class Progress(Protocol):
    """A watcher of a job that goes through stages of a known number of bytes."""

    def stage(self, title: str, size: int) -> None:
        """A stage of `size` bytes begins; the one before it is over."""
        ...

    def advance(self, size: int) -> None:
        """`size` more bytes of the stage are done. Called from any thread."""
        ...


class Silent:
    """Nobody watches."""

    def stage(self, title: str, size: int) -> None:
        """Say nothing."""

    def advance(self, size: int) -> None:
        """Say nothing."""
