"""Hash a base (SHA-256) in a thread of its own: hashing is the longest single task of an export."""

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
    """Hashes the data sections of a base's files (ModelSpec 1.0.1, `hash_sha256`), one after another.

    Up to its first target weight an output equals its source. So the bytes before it, such as a bundle's text encoders,
    are hashed once, and every output continues from that state.

    Args:
        plans: The plans to write; they share their checkpoint and cast.
        file_hashes: Hashes of whole files, by file name, that need no computing. The rest of such a file is not hashed.
    """

    def __init__(self, plans: Sequence[Plan], file_hashes: Mapping[str, str] = MappingProxyType({})) -> None:
        self._files: Sequence[SourceFile] = plans[0].checkpoint.files
        self._file_hashes = file_hashes
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
        """Return how many bytes at the start of the data section of file `number` all outputs share with it."""
        return self._shared[number]

    def state(self, number: int) -> "_Hash":
        """Wait for the hash state after the bytes that file `number` shares with its outputs, and copy it."""
        return self._states[number].result().copy()

    def file_hash(self, number: int) -> str | None:
        """Return the hash of the whole file `number` as hex, if it was given."""
        return self._file_hashes.get(self._files[number].name)

    def digest(self, number: int) -> str | None:
        """Wait for the hash of the data section of file `number`, as hex; None if the whole file's hash was given."""
        return None if self.file_hash(number) else self._digests[number].result()

    def _run(self) -> None:
        for number, file in enumerate(self._files):
            try:
                self._hash(number, file)
            except BaseException as error:  # noqa: BLE001  raised where the hash is needed
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
        if not self.file_hash(number):
            feed(digest, file, shared, file.data_size, self._stopped)
            self._digests[number].set_result(digest.hexdigest())
