"""The Ray cluster that work goes to: the one at RAY_ADDRESS, or a local one."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cdr_dist.errors import UserError

PATIENCE_S = 15.0
"""Seconds that a cluster has to take a connection: Ray itself would wait for minutes, and then say why in pages."""


def connect(**local: Any) -> None:
    """Connects to RAY_ADDRESS, or starts a local Ray with these options of ray.init.

    Nothing happens where that was done. UserError: nothing answers there, or it does not let this program in.
    """
    import ray

    if ray.is_initialized():
        return
    if address := os.environ.get("RAY_ADDRESS", ""):
        _connect(address)
    else:
        quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        ray.init(address="local", **quiet, **local)


def _connect(address: str) -> None:
    import ray

    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        _knock(address, host, int(port))
    try:
        with _quiet():
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise UserError(
            f"RAY_ADDRESS={address}: answers, but does not let this program in; is the cluster's token in "
            f"RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH (with RAY_AUTH_MODE=token), and its Ray {ray.__version__}?"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Ray's C++ says on stderr, a line a second where the token is wrong: the error says it once."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _knock(address: str, host: str, port: int) -> None:
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), port), timeout=5.0).close()
            return
        except OSError as error:
            if time.monotonic() > end or isinstance(error, socket.gaierror):
                reason = error.strerror or str(error)
                raise UserError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({reason})") from error
        time.sleep(1.0)
