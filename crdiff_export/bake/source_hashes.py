"""Hash a base (SHA-256) in a thread of its own: hashing is the longest single task of an export."""

import hashlib
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType
from typing import TYPE_CHECKING

from crdiff_export.formats import hash_cache
from crdiff_export.formats.hash_cache import FileState
from crdiff_export.formats.hashing import feed, remember, remembered_hash
from crdiff_export.formats.weight_file import SourceFile
from crdiff_export.prune.plan import Plan

if TYPE_CHECKING:
    from hashlib import _Hash
    from typing import Self


class SourceHashes:
    """Hashes the data sections of a base's files (ModelSpec 1.0.1, `hash_sha256`), one after another.

    Up to its first target weight an output equals its source. So the bytes before it, such as a bundle's text encoders,
    are hashed once, and every output continues from that state.

    Args:
        plans: The plans to write; they share their checkpoint and cast.
        file_hashes: Hashes of whole files, by file name, that need no computing. The rest of such a file is not hashed.
        cached: Take hashes from the user's cache where it has them of the files as they are. Computed hashes are always
            remembered.
    """

    def __init__(
        self, plans: Sequence[Plan], file_hashes: Mapping[str, str] = MappingProxyType({}), *, cached: bool = False
    ) -> None:
        self._files: Sequence[SourceFile] = plans[0].checkpoint.files
        self._file_hashes = file_hashes
        self._cached = cached
        self._states_read: list[list[FileState | None]] = [[] for _ in self._files]
        self._began_ns = hash_cache.now_ns()
        self._shared = [min(plan.unchanged(number) for plan in plans) for number in range(len(self._files))]
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(1, "crdiff-hash")

    def __enter__(self) -> "Self":
        self._states: list[Future[_Hash]] = []
        self._digests: list[Future[str]] = []
        for number in range(len(self._files)):
            self._states.append(self._pool.submit(self._hash_shared, number))
            self._digests.append(self._pool.submit(self._hash_rest, number))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

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

    def _hash_shared(self, number: int) -> "_Hash":
        digest = hashlib.sha256()
        self._states_read[number] += feed(digest, self._files[number], 0, self._shared[number], self._stopped)
        return digest

    def _hash_rest(self, number: int) -> str:
        digest, file = self.state(number), self._files[number]
        if self.file_hash(number):
            return digest.hexdigest()
        if self._cached and (known := remembered_hash(file)):
            return known
        states = self._states_read[number]
        states += feed(digest, file, self._shared[number], file.data_size, self._stopped)
        remember(states, digest.hexdigest(), self._began_ns)
        return digest.hexdigest()
