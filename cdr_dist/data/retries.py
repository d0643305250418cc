"""Deadline, tries and back-off around every request to a disk or an object store; failures in the user's words."""

from __future__ import annotations

import atexit
import os
import queue
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from cdr_dist.data.options import StorageOptions
from cdr_dist.errors import UserError

T = TypeVar("T")

LONGEST_WAIT_S = 30.0
"""Between two tries."""
SHORTEST_SECRET = 8
"""Characters: a shorter value, such as a test server's, may be part of any word."""
_SECRETS = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "RAY_AUTH_TOKEN",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
)
_IN_A_URI = re.compile(r"(?i)\bs3a?://[^/\s]*[:@]|\w://[^/\s]*@")
"""A secret may hold a slash, so that what is before it looks like a bucket; no bucket has a colon in its name."""
_found: set[str] = set()
"""Credentials that clients found elsewhere: in files, at a service."""
_MISSING = (FileNotFoundError, NotADirectoryError)
_PAST = {"read": "read", "write": "written", "remove": "removed", "list": "listed"}

_options = StorageOptions()
_ending = threading.Event()
_waits: set[Callable[[], object]] = set()


class StorageError(UserError):
    """A file that cannot be read, written, listed or removed at its place; another place may have it."""


class NotFoundError(StorageError):
    """A file that is to be read and is not there."""


def use(options: StorageOptions) -> None:
    """Sets the deadline, tries and back-off of this process."""
    global _options
    _options = options


def options() -> StorageOptions:
    """Those of this process."""
    return _options


def retried(
    action: Callable[[], T],
    what: str,
    how: str = "read",
    curable: Callable[[Exception], bool] = lambda _: True,
    tries: int = 0,
) -> T:
    """Runs an action until it succeeds, at most `tries` times (0: as the options say).

    how: read, write, remove or list. curable: whether trying again may help after an error. StorageError names `what`.
    """
    most = tries or _options.tries
    for tried in range(1, most + 1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # every client has its own errors: s3fs raises IndexError on a dead server
            if tried == most or _ending.is_set() or not curable(error):
                # Not `from error`: a traceback would show the client's own words, credentials in an address too.
                missing = isinstance(error, _MISSING) and how == "read"
                raise (NotFoundError if missing else StorageError)(f"{what}: {_reason(error, how, tried)}") from None
        _ending.wait(wait_s(tried))
    raise AssertionError("tries is at least 1")


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Turns any error of the block into one that names `what`, which is being read."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a parser's own errors
        raise StorageError(f"{what}: {_reason(error, 'read', 1)}") from None


def wait_s(tried: int) -> float:
    """Seconds to wait after the given number of tries: doubling, with jitter, so that workers do not come at once."""
    return min(LONGEST_WAIT_S, _options.backoff_s * 2 ** (tried - 1)) * random.uniform(0.5, 1.0)


def within_deadline(action: Callable[[], T]) -> T:
    """Runs what cannot be cancelled, in a thread that is left alone when it takes too long (TimeoutError)."""
    answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answer.put((action(), None))
        except BaseException as error:
            answer.put((None, error))

    # A daemon: an executor's threads are joined at exit, where a stalled disk would hold the process.
    threading.Thread(target=run, daemon=True, name="cdr-storage").start()
    limit = _options.deadline_s
    try:
        with ended_by(lambda: answer.put((None, InterruptedError("the process ends")))):
            result, error = answer.get(timeout=limit)
    except queue.Empty:
        raise late(limit) from None
    if error is not None:
        raise error
    return result


@contextmanager
def ended_by(cancel: Callable[[], object]) -> Iterator[None]:
    """While the block waits, the end of the process calls `cancel`; at once where it has come."""
    _waits.add(cancel)
    try:
        if _ending.is_set():  # before it was added, perhaps: then nobody else calls it
            cancel()
        yield
    finally:
        _waits.discard(cancel)


def ending() -> bool:
    """Whether the process ends: nothing is started or tried again."""
    return _ending.is_set()


@atexit.register
def end() -> None:
    """Makes every wait fail, so that no thread still reads when the interpreter goes down, which would abort it."""
    _ending.set()
    for cancel in list(_waits):
        cancel()


def late(seconds: float) -> TimeoutError:
    return TimeoutError(f"no answer within {seconds:g} s")


def keep_secret(*values: str | None) -> None:
    """Credentials that no message may show."""
    _found.update(value for value in values if value)


def refuse_secrets(text: str) -> None:
    """UserError where a URI in it may carry credentials; the message does not repeat them."""
    if _IN_A_URI.search(text):
        raise UserError("a URI with ':' or '@' in its bucket: credentials come from the environment, not from a URI")


def redacted(text: str) -> str:
    """Without what may be a credential: those of the environment and of clients, an address's user, signatures, …"""
    known = _found | {os.environ.get(name, "") for name in _SECRETS}
    for value in sorted((v for v in known if len(v) >= SHORTEST_SECRET), key=len, reverse=True):
        text = text.replace(value, "***")
    text = re.sub(r"//[^/@\s]+@", "//***@", text)
    text = re.sub(r"(https?://[^\s\"?]+)\?[^\s\"]*", r"\1", text)
    return re.sub(r"(?i)(signature|credential|security-token)=[^&,\s\"']+", r"\1=***", text)


def _reason(error: Exception, how: str, tried: int) -> str:
    times = f", {tried} tries" if tried > 1 else ""
    if isinstance(error, _MISSING) and how == "read":
        return "not found"
    if isinstance(error, TimeoutError):
        return f"{_first_line(error)}{times}"
    return f"cannot be {_PAST[how]} ({_first_line(error)}{times})"


def _first_line(error: Exception) -> str:
    text = str(getattr(error, "strerror", None) or error).strip()
    if text in ("", "None"):  # Ceph's server answers with a code and no message
        answer = getattr(error.__cause__, "response", {})
        text = answer.get("Error", {}).get("Code") or type(error).__name__
    if isinstance(error, IndexError | KeyError | AttributeError | TypeError):  # their words alone say nothing
        text = f"{type(error).__name__}: {text}"
    text = re.sub(r"^An error occurred \((\w+)\) when calling the \w+ operation[^:]*: ", r"\1 ", text)  # botocore's
    return redacted(text.splitlines()[0])[:200]
