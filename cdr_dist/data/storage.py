"""Local folders and object stores behind one door: paths and `s3://` URIs alike.

Every request has a deadline and is tried again where that can help (`retries`); what fails for good is one UserError
that names the file and the cause.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from fsspec.implementations.local import LocalFileSystem

from cdr_dist.crash_points import durable
from cdr_dist.data.local_files import LocalFiles
from cdr_dist.data.retries import NotFoundError, StorageError, naming, options, refuse_secrets, retried, use
from cdr_dist.errors import UserError

__all__ = ["NotFoundError", "StorageError", "naming", "options", "use"]

T = TypeVar("T")

REQUEST_BYTES = 32 << 20
"""Most bytes that one request reads."""
REQUESTS_AT_ONCE = 4
"""Of one large file."""


def locate(uri: str) -> tuple[Any, str]:
    """The place of a local path or an `s3://` URI (LocalFiles or ObjectStore), and the path in it."""
    protocol, separator, path = uri.partition("://")
    if not separator or protocol == "file":
        return LocalFiles(), str(LocalFileSystem._strip_protocol(uri)).rstrip("/") or "/"
    if protocol not in ("s3", "s3a"):
        raise UserError(f"{protocol}://…: unknown kind of storage; known: local paths and s3://bucket/folder")
    bucket = path.partition("/")[0]
    refuse_secrets(uri)
    if not bucket:
        raise UserError(f"{uri}: names no bucket; write s3://bucket/folder")
    return _store(os.getpid(), options().deadline_s, _surroundings()), path.rstrip("/")


def _surroundings() -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))


@functools.lru_cache(maxsize=4)
def _store(process: int, deadline_s: float, surroundings: tuple[tuple[str, str], ...]) -> Any:
    """One client for a process, an environment and a deadline: making it takes half a second."""
    from cdr_dist.data.object_store import ObjectStore  # loads s3fs

    return ObjectStore()


def is_local(uri: str) -> bool:
    return isinstance(locate(uri)[0], LocalFiles)


def absolute(uri: str) -> str:
    """The same place from any folder: a path from /, without file://, or the address of an object store."""
    return str(Path(uri.removeprefix("file://")).expanduser().absolute()) if is_local(uri) else uri.rstrip("/")


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/"), *names])


def exists(uri: str) -> bool:
    """Whether there is a file or a folder."""
    place, path = locate(uri)
    return retried(lambda: place.exists(path), uri, curable=place.curable)


def is_empty(uri: str) -> bool:
    """Nothing there: no file, and no folder with anything in it."""
    return not exists(uri) or (is_folder(uri) and not names(uri))


def is_folder(uri: str) -> bool:
    place, path = locate(uri)
    return retried(lambda: place.is_folder(path), uri, "list", place.curable)


def names(folder: str) -> list[str]:
    """Names of the files and folders directly in a folder, in order; [] where there is none."""
    place, path = locate(folder)
    return retried(lambda: place.names(path), folder, "list", place.curable)


def files(folder: str) -> list[str]:
    """URIs of all files below a folder, in order."""
    place, path = locate(folder)
    return sorted(place.uri(p) for p in retried(lambda: place.files(path), folder, "list", place.curable))


def matching(pattern: str) -> list[str]:
    """URIs of the files that match a pattern with `*`, in order."""
    place, path = locate(pattern)
    return sorted(place.uri(p) for p in retried(lambda: place.matching(path), pattern, "list", place.curable))


def size(uri: str) -> int:
    """Bytes of one file."""
    place, path = locate(uri)
    return retried(lambda: place.size(path), uri, curable=place.curable)


def read_range(uri: str, start: int, stop: int) -> bytes:
    """Bytes start..stop-1 of a file. A shorter answer counts as a failed try."""
    place, path = locate(uri)

    def read() -> bytes:
        content = place.read(path, start, stop)
        if len(content) != stop - start:
            raise OSError(f"{len(content)} bytes came instead of {stop - start}")
        return content

    return retried(read, uri, curable=place.curable) if stop > start else b""


def decoded(uri: str, size: int, decode: Callable[[Any], T]) -> T:
    """What `decode` makes of a file, which may read any part of it, with the tries of a request: what is damaged on its
    way is whole the next time. A file on a disk is read without Python, within one deadline for all of it.
    """
    place, path = locate(uri)
    if isinstance(place, LocalFiles):
        return retried(lambda: place.decoded(path, decode), uri, curable=place.curable)
    return retried(lambda: decode(InputFile(uri, size)), uri, curable=place.curable)


def read_bytes(uri: str) -> bytes:
    """The whole file."""
    whole = size(uri)
    spans = [(start, min(start + REQUEST_BYTES, whole)) for start in range(0, whole, REQUEST_BYTES)]
    if len(spans) <= 1:
        return read_range(uri, 0, whole)
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        return b"".join(pool.map(lambda span: read_range(uri, *span), spans))


def write_bytes(uri: str, content: bytes) -> None:
    """Writes a file, whole or not at all; local ones are on the disk, with their name, when this returns."""
    with open_output(uri) as file:
        file.write(content)


def open_input(uri: str) -> InputFile:
    """A binary file to read from, at any place of it."""
    return InputFile(uri, size(uri))


class InputFile(io.RawIOBase):
    """A file read by ranges. Small reads keep the last request's bytes: footers and neighbours cost no other."""

    least = 1 << 16
    """Bytes of a request, or more."""

    def __init__(self, uri: str, size: int) -> None:
        self._uri, self._size = uri, size
        self._at = self._first = 0
        self._kept = b""
        self._fetched: list[tuple[int, bytes]] = []

    def fetch(self, spans: Iterable[tuple[int, int]]) -> None:
        """Reads the bytes start..stop-1 of each span now, neighbours in one request, for later reads within them.

        They replace those of the call before. A span that is not of the file is left out.
        """
        self._fetched = []
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(span for span in spans if 0 <= span[0] < span[1] <= self._size):
            if merged and start <= merged[-1][1] + self.least:
                start, stop = merged[-1][0], max(merged.pop()[1], stop)
            merged.append((start, stop))
        self._fetched = [(start, self._fetch(start, stop)) for start, stop in merged]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def read(self, count: int | None = -1) -> bytes:
        start = min(self._at, self._size)
        stop = self._size if count is None or count < 0 else min(start + count, self._size)
        self._at = stop
        for first, content in self._fetched:
            if first <= start and stop <= first + len(content):
                return content[start - first : stop - first]
        if stop - start > self.least:
            return self._fetch(start, stop)
        if not self._first <= start <= stop <= self._first + len(self._kept):
            first = max(0, min(start, self._size - self.least))  # near the end: all of the end
            self._kept, self._first = self._fetch(first, min(self._size, max(stop, first + self.least))), first
        return self._kept[start - self._first : stop - self._first]

    def _fetch(self, start: int, stop: int) -> bytes:
        spans = [(a, min(a + REQUEST_BYTES, stop)) for a in range(start, stop, REQUEST_BYTES)]
        return b"".join(read_range(self._uri, *span) for span in spans)

    def readinto(self, buffer: Any) -> int:
        into = memoryview(buffer).cast("B")
        content = self.read(len(into))
        into[: len(content)] = content
        return len(content)

    def readall(self) -> bytes:
        return self.read()


@contextmanager
def open_output(uri: str, durable: bool = True) -> Iterator[OutputFile]:
    """A binary file to write to; it appears, whole, when the block ends without an error. A local folder is made.

    durable: a local file is on the disk when the block has ended, also where the machine then loses power.
    """
    place, path = locate(uri)
    file = OutputFile(uri, place.upload(path, durable), place.curable)
    try:
        yield file
        file.commit()
    except BaseException:
        file.abort()
        raise


class OutputFile(io.RawIOBase):
    """A file written piece by piece, each of them tried again where it fails. `commit` ends it."""

    def __init__(self, uri: str, upload: Any, curable: Callable[[Exception], bool]) -> None:
        self._uri, self._upload, self._curable = uri, upload, curable
        self._pending = bytearray()
        self._sent = self._pieces = 0
        self._retried(upload.start)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._sent + len(self._pending)

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        self._pending += view
        piece = self._upload.piece_bytes
        while len(self._pending) >= piece:
            self._send(bytes(memoryview(self._pending)[:piece]))
            del self._pending[:piece]
        return len(view)

    def commit(self) -> None:
        if self._pending:
            self._send(bytes(self._pending))
        self._retried(self._upload.commit)

    def abort(self) -> None:
        """Removes what was written, if it can be: the error that led here counts, not another one."""
        with suppress(Exception):
            self._upload.abort()

    def _send(self, content: bytes) -> None:
        number = self._pieces
        self._retried(lambda: self._upload.send(number, content))
        self._pieces += 1
        self._sent += len(content)

    def _retried(self, action: Callable[[], None]) -> None:
        retried(action, self._uri, "write", self._curable)


STARTED = "started"


def check_writable(folder: str, what: str, content: bytes = b"started") -> None:
    """Writes a small file, STARTED, in a folder. UserError naming `what` where that fails."""
    place, path = locate(join(folder, STARTED))
    file = OutputFile(what, place.upload(path, durable=False), place.curable)
    file.write(content)
    file.commit()


def remove_file(uri: str) -> None:
    """Removes a file; nothing happens where there is none."""
    place, path = locate(uri)
    retried(lambda: place.remove(path), uri, "remove", place.curable)


def remove_folder(uri: str, tries: int = 0) -> None:
    """Removes a folder and all in it; nothing happens where there is none. tries: of each request, 0 as usual."""
    place, path = locate(uri)
    if isinstance(place, LocalFiles):
        retried(lambda: place.remove_folder(path), uri, "remove", place.curable, tries)
        return
    found = retried(lambda: place.files(path), uri, "list", place.curable, tries)
    for first in range(0, len(found), place.most_removed):
        some = found[first : first + place.most_removed]
        retried(functools.partial(place.remove_all, some), uri, "remove", place.curable, tries)


def move_folder(start: str, end: str, last: str) -> None:
    """Moves a folder: at once where that is possible, else file by file with the file `last` at the end."""
    place, source = locate(start)
    _, destination = locate(end)
    if isinstance(place, LocalFiles):
        retried(lambda: place.rename(source, destination), end, "write", place.curable)
        return
    found = retried(lambda: place.files(source), start, "list", place.curable)
    for path in sorted(found, key=lambda path: (path.endswith("/" + last), path)):
        copy = functools.partial(place.copy, path, destination + path.removeprefix(source))
        with durable("prepare.moved_file"):
            retried(copy, place.uri(path), "write", place.curable)
    remove_folder(start)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
