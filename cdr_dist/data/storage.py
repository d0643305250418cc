"""Local folders and object stores behind one door (fsspec)."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cdr_dist.errors import UserError

T = TypeVar("T")

READ_DEADLINE_S = 120.0
"""Longest wait for one read: a stalled object store otherwise hangs past its client's own time-out."""

_readers = concurrent.futures.ThreadPoolExecutor(max_workers=16, thread_name_prefix="cdr-read")


def locate(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a local path or a URI such as `s3://bucket/folder`, and the path in it."""
    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise UserError(f"{uri}: {error}") from error
    return fs, path.rstrip("/") or "/"


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/"), *names])


def exists(uri: str) -> bool:
    fs, path = locate(uri)
    return bool(fs.exists(path))


def read_bytes(uri: str) -> bytes:
    """The whole file. Raises UserError naming the file where it is missing or cannot be read in time."""
    fs, path = locate(uri)
    return with_deadline(lambda: fs.cat_file(path), uri)


def write_bytes(uri: str, content: bytes) -> None:
    fs, path = locate(uri)
    _make_parent(fs, path)
    fs.pipe_file(path, content)


def _make_parent(fs: fsspec.AbstractFileSystem, path: str) -> None:
    """Makes a file's folder; not on S3, which has none, and where s3fs would make a mistyped bucket instead."""
    if "s3" not in fs.protocol:
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)


def size(uri: str) -> int:
    """Bytes of one file. UserError where it is missing or cannot be reached."""
    fs, path = locate(uri)
    return int(with_deadline(lambda: fs.info(path)["size"], uri))


def open_input(uri: str) -> Any:
    """A binary file to read from. UserError where it is missing or cannot be opened."""
    fs, path = locate(uri)
    return with_deadline(lambda: fs.open(path, "rb"), uri)


def open_output(uri: str) -> Any:
    """A binary file to write to; its folder is made."""
    fs, path = locate(uri)
    _make_parent(fs, path)
    return fs.open(path, "wb")


def check_writable(folder: str, what: str) -> None:
    """Writes a small file in a folder. UserError naming `what` where that fails."""
    try:
        write_bytes(join(folder, "started"), b"started")
    except Exception as error:  # as in with_deadline: every client has its own errors
        raise UserError(f"{what}: cannot be written ({_first_line(error)})") from error


def is_empty(uri: str) -> bool:
    """Nothing there: no file, and no folder with anything in it."""
    fs, path = locate(uri)
    fs.invalidate_cache()
    return not fs.exists(path) or (fs.isdir(path) and not fs.ls(path, detail=False))


def remove_folder(uri: str) -> None:
    """Removes a folder and all in it; nothing happens where there is none."""
    fs, path = locate(uri)
    fs.invalidate_cache()
    if fs.exists(path):
        fs.rm(path, recursive=True)


def move_folder(start: str, end: str, last: str) -> None:
    """Moves a folder: at once where the file system can, else file by file with the file `last` at the end."""
    fs, source = locate(start)
    _, destination = locate(end)
    if isinstance(fs, LocalFileSystem):
        os.rename(source, destination)  # over an empty folder too
        return
    fs.invalidate_cache()
    paths = sorted(fs.find(source), key=lambda path: (path.endswith("/" + last), path))
    for path in paths:
        fs.mv(path, destination + path.removeprefix(source))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def with_deadline(read: Callable[[], T], what: str, seconds: float | None = None) -> T:
    """Runs a read under a deadline; any failure becomes one error that names `what`."""
    limit = READ_DEADLINE_S if seconds is None else seconds
    future: concurrent.futures.Future[T] = _readers.submit(read)
    try:
        return future.result(timeout=limit)
    except concurrent.futures.TimeoutError:
        future.cancel()
        raise UserError(f"{what}: no answer within {limit:.0f} s") from None
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{what}: not found") from None
    except Exception as error:  # every client has its own errors: s3fs raises IndexError on a dead server
        raise UserError(f"{what}: cannot be read ({_first_line(error)})") from error


def _first_line(error: Any) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
