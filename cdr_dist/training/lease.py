"""One job at a time on a run folder: lease.json names its holder and changes as long as the holder lives."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from typing import Any

import psutil

from cdr_dist.crash_points import durable
from cdr_dist.data import storage
from cdr_dist.errors import UserError


class LeaseLostError(UserError):
    """Another job holds the run folder now: nothing in it may be written or removed any more."""


FILE = "lease.json"
BEAT_S = 10.0
"""Seconds between two signs of life."""
PATIENCE_S = 35.0
"""Seconds without one after which a holder on another host counts as gone."""


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
        holder = _read(self._uri)
        if holder is not None and _alive(self._uri, holder):
            raise UserError(
                f"{self._uri}: another job works on this run (process {holder['process']} on {holder['host']}); "
                "wait for its end or stop it"
            )
        with durable("run.lease"):
            self._beat()
        check(self._uri, self.token)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        with contextlib.suppress(UserError):  # it lapses, and the run's own error counts
            holder = _read(self._uri)
            if holder is not None and holder["token"] == self.token:
                with durable("run.release"):
                    storage.remove_file(self._uri)

    def _beat(self) -> None:
        me = psutil.Process()
        holder = {"token": self.token, "host": socket.gethostname(), "process": me.pid, "since": me.create_time()}
        storage.write_bytes(self._uri, json.dumps(holder | {"beats": self._beats}).encode())
        self._beats += 1

    def _live(self) -> None:
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(UserError):  # a store that does not answer is asked again
                holder = _read(self._uri)
                if holder is None or holder["token"] != self.token:
                    return  # taken over: the next checkpoint says so
                self._beat()


def check(lease: str, token: str) -> None:
    """LeaseLostError unless the lease is still the job's whose token this is; StorageError where nobody can tell."""
    holder = _read(lease)
    if holder is None or holder["token"] != token:
        raise LeaseLostError(f"{lease}: another job has taken this run over; this one ends")


def _read(uri: str) -> dict[str, Any] | None:
    """None: nobody holds it, or it does not say who does. StorageError: it cannot be read now."""
    try:
        content = storage.read_bytes(uri)
    except storage.NotFoundError:
        return None
    try:
        holder = json.loads(content)
        return holder if {"token", "host", "process", "since"} <= set(holder) else None
    except (ValueError, TypeError):
        return None


def _alive(uri: str, holder: dict[str, Any]) -> bool:
    if holder["host"] == socket.gethostname():
        try:
            same = abs(psutil.Process(holder["process"]).create_time() - holder["since"]) < 1.0
        except psutil.NoSuchProcess:
            return False
        return same and holder["process"] != os.getpid()
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        time.sleep(1.0)
        if (now := _read(uri)) is None:
            return False
        if now != holder:
            return True
    return False
