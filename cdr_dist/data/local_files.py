"""Files of a local or network disk. Errors are the operating system's; a stalled disk is a TimeoutError."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from cdr_dist.crash_points import durable
from cdr_dist.data.retries import within_deadline

T = TypeVar("T")

_CURABLE = (errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.EINTR)
"""What a network disk may recover from."""
_MOST_SWEEPS = 20
"""Times that a folder is swept before what others write into it is an error."""


class LocalFiles:
    """What `storage` asks of a place; paths are absolute."""

    def curable(self, error: Exception) -> bool:
        return isinstance(error, TimeoutError) or (isinstance(error, OSError) and error.errno in _CURABLE)

    def size(self, path: str) -> int:
        return within_deadline(lambda: os.stat(path).st_size)

    def read(self, path: str, start: int, stop: int) -> bytes:
        return within_deadline(lambda: _read(path, start, stop))

    def decoded(self, path: str, decode: Callable[[Any], T]) -> T:
        """What `decode` makes of the file, given as Arrow's own."""

        def read() -> T:
            with pa.OSFile(path) as file:
                return decode(file)

        return within_deadline(read)

    def exists(self, path: str) -> bool:
        return within_deadline(lambda: os.path.exists(path))

    def is_folder(self, path: str) -> bool:
        return within_deadline(lambda: os.path.isdir(path))

    def names(self, path: str) -> list[str]:
        return within_deadline(lambda: sorted(os.listdir(path)) if os.path.isdir(path) else [])

    def files(self, path: str) -> list[str]:
        """All below a folder."""
        return within_deadline(lambda: LocalFileSystem().find(path))

    def matching(self, pattern: str) -> list[str]:
        return within_deadline(lambda: LocalFileSystem().glob(pattern))

    def remove(self, path: str) -> None:
        within_deadline(lambda: _remove(path))

    def remove_folder(self, path: str) -> None:
        """Also where others still rename or remove files in it."""
        if not os.path.isdir(path):
            _remove(path)
            return
        for _ in range(_MOST_SWEEPS):
            try:
                shutil.rmtree(path)
                return
            except FileNotFoundError:
                if not os.path.isdir(path):
                    return
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
        shutil.rmtree(path)

    def rename(self, start: str, end: str) -> None:
        """Also over an empty folder."""

        def rename() -> None:
            os.rename(start, end)
            _sync_folder(os.path.dirname(end))

        within_deadline(rename)

    def upload(self, path: str, durable: bool) -> LocalUpload:
        return LocalUpload(path, durable)

    def uri(self, path: str) -> str:
        return path


class LocalUpload:
    """A file that appears under its name when it is committed."""

    piece_bytes = 8 << 20

    def __init__(self, path: str, durable: bool) -> None:
        self._path, self._durable = path, durable
        folder, name = os.path.split(path)
        self._part = os.path.join(folder, f".{name}.{uuid.uuid4().hex[:8]}.part")
        self._file: Any = None

    def start(self) -> None:
        def make() -> Any:
            _make_folder(os.path.dirname(self._path), self._durable)
            return open(self._part, "wb", buffering=0)

        self._file = within_deadline(make)

    def send(self, number: int, content: bytes) -> None:
        """Piece `number` of the file, from 0; all but the last have piece_bytes. Again where it failed."""
        file = self._file

        def write() -> None:
            file.seek(number * self.piece_bytes)
            rest = memoryview(content)
            while rest:
                rest = rest[file.write(rest) :]
            if self._durable:
                os.fsync(file.fileno())

        within_deadline(write)

    def commit(self) -> None:
        def rename() -> None:
            self._file.close()
            if os.path.exists(self._part) or not os.path.exists(self._path):  # else: renamed by a try before
                with durable("file.rename"):
                    os.replace(self._part, self._path)
            if self._durable:
                _sync_folder(os.path.dirname(self._path))

        within_deadline(rename)

    def abort(self) -> None:
        if self._file is not None:
            self._file.close()
            _remove(self._part)


def _make_folder(path: str, durable: bool) -> None:
    """With its parents; a new folder's name lasts once the folder that it stands in is on the disk."""
    new, above = [], path
    while not os.path.exists(above):
        new.append(above)
        above = os.path.dirname(above)
    os.makedirs(path, exist_ok=True)
    if durable:
        for folder in new:
            _sync_folder(os.path.dirname(folder))


def _sync_folder(path: str) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read(path: str, start: int, stop: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(stop - start)


def _remove(path: str) -> None:
    try:
        os.remove(path)
    except (FileNotFoundError, NotADirectoryError):
        return
