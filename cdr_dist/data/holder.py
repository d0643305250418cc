"""Who holds a folder: a host and a process on it, which others can look for."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

import psutil

NAMES = {"host", "process", "since"}


def me() -> dict[str, Any]:
    """This process."""
    return {"host": socket.gethostname(), "process": os.getpid(), "since": psutil.Process().create_time()}


def read(content: bytes) -> dict[str, Any] | None:
    """What `me` said, as JSON, with or without more. None: it does not say who."""
    try:
        found = json.loads(content)
        return found if set(found) >= NAMES else None
    except (ValueError, TypeError):
        return None


def is_here(holder: dict[str, Any]) -> bool:
    """Whether it is, or was, a process of this host, so that `lives` can tell."""
    return holder["host"] == socket.gethostname()


def lives(holder: dict[str, Any]) -> bool:
    """Whether the process, another one of this host, still runs."""
    try:
        same = abs(psutil.Process(holder["process"]).create_time() - holder["since"]) < 1.0
    except (psutil.NoSuchProcess, TypeError, ValueError):
        return False
    return same and holder["process"] != os.getpid()
