"""Files of an S3-compatible object store, through s3fs. Endpoint, region and credentials come from the environment.

Every request has the deadline of `storage.*` and is cancelled when it passes. Neither s3fs nor its client tries again:
`storage` does, so that the time a dead server takes is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine
from typing import Any

from botocore import exceptions as boto

from cdr_dist.data import retries

CLIENT_S = 10.0
"""What making the client may take on top of the first request's deadline."""
LOOP_S = 5.0
"""How long s3fs's thread may take to notice a deadline."""
KEYS_S = 1.0
"""What asking for credentials may take that the client has already, unless they were about to expire."""
_CURABLE_CODES = ("SlowDown", "RequestTimeout", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch")
_INCURABLE = (
    FileNotFoundError,
    PermissionError,
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.ParamValidationError,
    boto.ProfileNotFound,
    boto.ConfigParseError,
    boto.ConfigNotFound,
    boto.InvalidRegionError,
)


class ObjectStore:
    """What `storage` asks of a place; paths are `bucket/key`."""

    most_removed = 1000

    def __init__(self) -> None:
        import s3fs

        wait = retries.options().deadline_s
        region = os.environ.get("AWS_REGION")  # botocore reads AWS_DEFAULT_REGION only
        self._fs: Any = s3fs.S3FileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,  # other processes write, too
            client_kwargs={"region_name": region} if region else {},
            config_kwargs={
                "connect_timeout": wait,
                "read_timeout": wait,
                "max_pool_connections": 32,
                "retries": {"mode": "standard", "total_max_attempts": 1},
            },
        )
        self._fs.retries = 1

    def arrow(self) -> Any:
        """The same client as a file system of pyarrow."""
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        return PyFileSystem(FSSpecHandler(self._fs))

    def curable(self, error: Exception) -> bool:
        answer = next((e.response for e in (error, error.__cause__) if isinstance(e, boto.ClientError)), None)
        if answer is not None:
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
            return status >= 500 or status in (408, 429) or answer.get("Error", {}).get("Code") in _CURABLE_CODES
        wrong_endpoint = type(error) is ValueError
        return not isinstance(error, _INCURABLE) and not wrong_endpoint

    def size(self, path: str) -> int:
        bucket, key = _split(path)
        return int(self._call("head_object", Bucket=bucket, Key=key)["ContentLength"])

    def read(self, path: str, start: int, stop: int) -> bytes:
        bucket, key = _split(path)
        return self._wait(self._get, bucket, key, f"bytes={start}-{stop - 1}")

    async def _get(self, bucket: str, key: str, span: str) -> bytes:
        answer = await self._fs._call_s3("get_object", Bucket=bucket, Key=key, Range=span)
        try:
            return await answer["Body"].read()
        finally:
            answer["Body"].close()

    def exists(self, path: str) -> bool:
        """Whether there is a file or a folder."""
        with contextlib.suppress(FileNotFoundError):
            if "/" in path:
                self.size(path)
                return True
        return bool(self._list(path, most=1))

    def names(self, path: str) -> list[str]:
        found = self._list(path)
        return sorted({name for one in found if (name := one["name"].removeprefix(path + "/").rstrip("/"))})

    def is_folder(self, path: str) -> bool:
        return bool(self._list(path, most=1))

    def files(self, path: str) -> list[str]:
        """All below a folder."""
        return [one["name"] for one in self._list(path, delimiter="")]

    def matching(self, pattern: str) -> list[str]:
        return self._wait(self._fs._glob, pattern)

    def remove(self, path: str) -> None:
        bucket, key = _split(path)
        self._call("delete_object", Bucket=bucket, Key=key)

    def remove_all(self, paths: list[str]) -> None:
        """At most `most_removed` files of one bucket."""
        keys = [{"Key": _split(path)[1]} for path in paths]
        answer = self._call("delete_objects", Bucket=_split(paths[0])[0], Delete={"Objects": keys, "Quiet": True})
        for error in answer.get("Errors", [])[:1]:
            raise OSError(f"{error.get('Key')}: {error.get('Message') or error.get('Code')}")

    def copy(self, start: str, end: str) -> None:
        self._wait(self._fs._cp_file, start, end)

    def upload(self, path: str, durable: bool) -> ObjectUpload:
        return ObjectUpload(self._call, self.size, path)

    def uri(self, path: str) -> str:
        return f"s3://{path}"

    def _list(self, path: str, delimiter: str = "/", most: int | None = None) -> list[dict[str, Any]]:
        """[] also where the bucket is missing: writing to it says so."""
        try:
            return self._wait(self._fs._lsdir, path, refresh=True, delimiter=delimiter, max_items=most)
        except FileNotFoundError:
            return []

    def _call(self, method: str, **arguments: Any) -> Any:
        return self._wait(self._fs._call_s3, method, **arguments)

    def _wait(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Runs one of s3fs's coroutines and cancels it at the deadline, so that no thread waits on."""
        limit = retries.options().deadline_s + (0.0 if self._fs._s3 is not None else CLIENT_S)
        work = self._outcome(function(*arguments, **named), limit)
        future = asyncio.run_coroutine_threadsafe(work, self._fs.loop)
        try:
            with retries.ended_by(future.cancel):
                found = future.result(limit + LOOP_S)
        except TimeoutError as error:
            found = error
        finally:
            future.cancel()  # where this thread was interrupted
        if isinstance(found, TimeoutError):
            raise retries.late(limit)
        if isinstance(found, Exception):
            raise found
        return found

    async def _outcome(self, work: Coroutine[Any, Any, Any], limit: float) -> Any:
        """A result, or an error as one: asyncio complains of what cancelled work raises, which nobody fetches."""
        try:
            found = await asyncio.wait_for(work, limit)
        except Exception as error:
            found = error
        if self._fs._s3 is not None:
            with contextlib.suppress(TimeoutError, boto.BotoCoreError, boto.ClientError):  # there are no new ones
                await asyncio.wait_for(self._keep_credentials(), KEYS_S)
        return found

    async def _keep_credentials(self) -> None:
        """Those that the client signs with, wherever it found them: its words may show them."""
        if (found := await self._fs.session.get_credentials()) is not None:
            keys = await found.get_frozen_credentials()
            retries.keep_secret(keys.access_key, keys.secret_key, keys.token)


class ObjectUpload:
    """One PUT, or a multipart upload where there is more than a piece: the object appears when it is committed."""

    piece_bytes = 32 << 20

    def __init__(self, call: Callable[..., Any], size: Callable[[str], int], path: str) -> None:
        self._call, self._size, self._path = call, size, path
        self._bucket, self._key = _split(path)
        self._id: str | None = None
        self._parts: dict[int, str] = {}
        self._bytes: dict[int, int] = {}
        self._whole: bytes | None = None
        self._completing = False

    def start(self) -> None: ...

    def send(self, number: int, content: bytes) -> None:
        """Piece `number` of the file, from 0; all but the last have piece_bytes. Again where it failed."""
        if number == 0 and len(content) < self.piece_bytes:
            self._whole = content
            return
        at = {"Bucket": self._bucket, "Key": self._key}
        if self._id is None:
            self._id = self._call("create_multipart_upload", **at)["UploadId"]
        answer = self._call("upload_part", **at, UploadId=self._id, PartNumber=number + 1, Body=content)
        self._parts[number + 1], self._bytes[number + 1] = answer["ETag"], len(content)

    def commit(self) -> None:
        at = {"Bucket": self._bucket, "Key": self._key}
        if self._id is None:
            self._call("put_object", **at, Body=self._whole or b"")
            return
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in sorted(self._parts.items())]
        again, self._completing = self._completing, True
        try:
            self._call("complete_multipart_upload", **at, UploadId=self._id, MultipartUpload={"Parts": parts})
        except FileNotFoundError:
            # A try before completed it and its answer was lost.
            if not again or self._size(self._path) != sum(self._bytes.values()):
                raise

    def abort(self) -> None:
        if self._id is not None:
            self._call("abort_multipart_upload", Bucket=self._bucket, Key=self._key, UploadId=self._id)


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.partition("/")
    return bucket, key
