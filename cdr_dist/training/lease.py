"""One job at a time on a run folder: lease.json names its holder and changes as long as the holder lives."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from typing import Any

from cdr_dist.crash_points import durable
from cdr_dist.data import holder, storage
from cdr_dist.errors import UserError


class LeaseLostError(UserError):
    """Another job holds the run folder now: nothing in it may be written or removed any more."""


FILE = "lease.json"
BEAT_S = 10.0
"""Seconds between two signs of life."""
PATIENCE_S = 35.0
"""Seconds without one after which a holder on another host counts as gone."""

READS = 3
"""Of a lease that does not say who holds it, before it counts as lost."""


class Lease:
    """Held from entering the block to its end. UserError where another job holds the folder.

    A holder on this host is asked for by its process; one on another host is watched, so clocks need not agree.
    """

    def __init__(self, folder: str) -> None:
        self._uri = storage.join(folder, FILE)
        self.token = uuid.uuid4().hex
        self._beats = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True, name="cdr-lease")

    def __enter__(self) -> Lease:
        other = _read(self._uri)
        if other is not None and _alive(self._uri, other):
            raise UserError(
                f"{self._uri}: another job works here (process {other['process']} on {other['host']}); "
                "wait for its end or stop it"
            )
        with durable("run.lease"):
            self._beat()
        check(self._uri, self.token)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hold_still()
        with contextlib.suppress(UserError):  # it lapses, and the run's own error counts
            last = _read(self._uri)
            if last is not None and last["token"] == self.token:
                with durable("run.release"):
                    storage.remove_file(self._uri)

    def hold_still(self) -> None:
        """No more signs of life: the folder may now be removed. Others still wait for PATIENCE_S."""
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        said = holder.me() | {"token": self.token, "beats": self._beats}
        storage.write_bytes(self._uri, json.dumps(said).encode())
        self._beats += 1

    def _live(self) -> None:
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(UserError):  # a store that does not answer is asked again
                if not _is_held(self._uri, self.token):
                    return  # taken over: the next checkpoint says so
                with durable("run.beat"):
                    self._beat()


def check(lease: str, token: str) -> None:
    """LeaseLostError unless the lease is still the job's whose token this is; StorageError where nobody can tell."""
    if not _is_held(lease, token):
        raise LeaseLostError(f"{lease}: another job has taken over here; this one ends")


def _is_held(uri: str, token: str) -> bool:
    """What another job has written is believed at once; that nobody holds it, when it is read so again and again: a
    store may have nothing to show while a sign of life replaces the one before."""
    for _ in range(READS):
        if (last := _read(uri)) is not None:
            return bool(last["token"] == token)
        time.sleep(0.3)
    return False


def _read(uri: str) -> dict[str, Any] | None:
    """None: nobody holds it, or it does not say who does. StorageError: it cannot be read now."""
    try:
        content = storage.read_bytes(uri)
    except storage.NotFoundError:
        return None
    found = holder.read(content)
    return found if found is not None and "token" in found else None


def _alive(uri: str, other: dict[str, Any]) -> bool:
    if holder.is_here(other):
        return holder.lives(other)
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        time.sleep(1.0)
        if (now := _read(uri)) is None:
            return False
        if now != other:
            return True
    return False
