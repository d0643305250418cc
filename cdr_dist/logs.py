"""What jobs say while they work, on stderr: plain lines, or with CDR_LOG=json one JSON object a line, for a collector.

Every object has time (UTC), level, job, run and message; a training step's has step, split and values, too.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys
from typing import Any

_handler: logging.Handler | None = None


def as_json() -> bool:
    return os.environ.get("CDR_LOG", "") == "json"


def configure(job: str, run: str = "", plain: str = "%(message)s", level: int = logging.INFO) -> None:
    """The log of this process. run: the folder that the job works on. plain: the format of lines that are not JSON."""
    global _handler
    root = logging.getLogger()
    if _handler is not None:
        root.removeHandler(_handler)
    _handler = _ToStderr()
    _handler.setFormatter(_Json(job, run) if as_json() else logging.Formatter(plain))
    root.addHandler(_handler)
    logging.getLogger("cdr_dist").setLevel(level)  # the clients of object stores have much to say, too


def line(job: str, run: str, message: str, level: str = "info", **more: Any) -> str:
    """One JSON object; what is no number in more is null."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    said = {"time": now, "level": level, "job": job, "run": run, "message": message} | more
    return json.dumps(said, default=str)


def error(job: str, message: str) -> None:
    """A job's last word."""
    print(line(job, "", message, "error") if as_json() else f"{job}: {message}", file=sys.stderr, flush=True)


class _ToStderr(logging.Handler):
    """Whatever sys.stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


class _Json(logging.Formatter):
    def __init__(self, job: str, run: str) -> None:
        super().__init__()
        self._job, self._run = job, run

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        return line(self._job, self._run, message, record.levelname.lower(), logger=record.name)
