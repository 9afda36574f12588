"""The SHA-256 of a base, in a thread of its own beside all other work: it is the longest single task of an export."""

import hashlib
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from crdiff_export.formats.hashing import feed
from crdiff_export.formats.weight_file import SourceFile
from crdiff_export.prune.plan import Plan

if TYPE_CHECKING:
    from hashlib import _Hash


class SourceHashes:
    """The hashes of the data sections of a base's files (ModelSpec 1.0.1, `hash_sha256`), one after another.

    Up to its first target weight an output is its source, so the state there serves all of them: what comes before, a
    bundle's text encoders for instance, is hashed once. `known` are hashes of whole files, by file name, that somebody
    else vouches for; such a file is hashed no further than that. The plans share their checkpoint and cast.
    """

    def __init__(self, plans: Sequence[Plan], known: Mapping[str, str] = MappingProxyType({})) -> None:
        self._files: Sequence[SourceFile] = plans[0].checkpoint.files
        self._known = known
        self._shared = [min(plan.unchanged(number) for plan in plans) for number in range(len(self._files))]
        self._states: list[Future[_Hash]] = [Future() for _ in self._files]
        self._digests: list[Future[str]] = [Future() for _ in self._files]
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="crdiff-hash", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopped.set()
        self._thread.join()

    def shared(self, number: int) -> int:
        """How many bytes at the start of file `number`'s data section all outputs share with it."""
        return self._shared[number]

    def state(self, number: int) -> "_Hash":
        """The hash of what file `number` shares with its outputs, to be continued; waits for it."""
        return self._states[number].result().copy()

    def known(self, number: int) -> str | None:
        """The hash of the whole of file `number` as hex, where it was known."""
        return self._known.get(self._files[number].name)

    def digest(self, number: int) -> str | None:
        """The hash of file `number`'s data section as hex, waiting for it; None where the whole file's is known."""
        return None if self.known(number) else self._digests[number].result()

    def _run(self) -> None:
        for number, file in enumerate(self._files):
            try:
                self._hash(number, file)
            except BaseException as error:  # noqa: BLE001  handed to whoever asks for the hash
                self._fail(error)
                return

    def _fail(self, error: BaseException) -> None:
        futures: list[Future[Any]] = [*self._states, *self._digests]
        for future in futures:
            if not future.done():
                future.set_exception(error)

    def _hash(self, number: int, file: SourceFile) -> None:
        digest, shared = hashlib.sha256(), self._shared[number]
        feed(digest, file, 0, shared, self._stopped)
        self._states[number].set_result(digest.copy())
        if not self.known(number):
            feed(digest, file, shared, file.data_size, self._stopped)
            self._digests[number].set_result(digest.hexdigest())
