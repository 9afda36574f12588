"""The folder that hf_xet writes to for the address local://FOLDER, read from the server's side."""

import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from tests.support.loopback.store import Content


class XetStore:
    """Files in a folder of Xet's storage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"local://{folder}"
        self._lock = threading.Lock()
        self._fetched: dict[str, bytes] = {}

    def put(self, content: Content) -> str:
        """Upload as a client does, and return the Xet hash."""
        import hf_xet  # type: ignore[import-untyped, unused-ignore]

        with hf_xet.XetSession().new_upload_commit(endpoint=self.url) as commit:
            upload = commit.start_upload_bytes(content.read(), sha256=hf_xet.COMPUTE_SHA256, name="file")
        return str(upload.result().xet_info.hash)

    def find(self, sha256: str) -> tuple[Content, str] | None:
        """Find a file that a client has uploaded: its content and its Xet hash."""
        for shard in self.folder.rglob("shards/*.mdb"):
            for known, size, xet in _shard_files(shard.read_bytes()):
                if known == sha256:
                    return XetContent(self, xet, size, sha256), xet
        return None

    def fetch(self, xet: str, size: int) -> bytes:
        """Put a file together."""
        import hf_xet  # type: ignore[import-untyped, unused-ignore]

        with self._lock:
            if xet not in self._fetched:
                group = hf_xet.XetSession().new_download_stream_group(endpoint=self.url)
                self._fetched[xet] = b"".join(map(bytes, group.download_stream(hf_xet.XetFileInfo(xet, size))))
            return self._fetched[xet]


class XetContent(Content):
    """A file in the storage. It is read when it is needed: a client that is uploading has locked the storage."""

    def __init__(self, store: XetStore, xet: str, size: int, sha256: str) -> None:
        super().__init__(b"", sha256)
        self.size = size
        self._store, self._xet = store, xet

    def open(self) -> BytesIO:
        return BytesIO(self._store.fetch(self._xet, self.size))


def _shard_files(shard: bytes) -> Iterator[tuple[str, int, str]]:
    """Yield the sha256, size and Xet hash of every file in a shard's first section.

    Records of 48 bytes: one of the file (hash, flags, number of segments), its segments, as many for verification
    (flag 31) and one with the sha256 (flag 30); the section ends with a hash of all ones.
    """
    at = 48
    while (name := shard[at : at + 32]) != b"\xff" * 32:
        flags, count = (int.from_bytes(shard[i : i + 4], "little") for i in (at + 32, at + 36))
        segments = range(at + 48, at + 48 * (1 + count), 48)
        size = sum(int.from_bytes(shard[i + 36 : i + 40], "little") for i in segments)
        at += 48 * (1 + count + (count if flags >> 31 & 1 else 0))
        if flags >> 30 & 1:
            yield _hex(shard[at : at + 32]), size, _hex(name)
            at += 48


def _hex(raw: bytes) -> str:
    """As xet-core writes a hash: four numbers of 64 bits, each little-endian in memory."""
    return "".join(raw[i : i + 8][::-1].hex() for i in range(0, 32, 8))
