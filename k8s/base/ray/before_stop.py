"""preStop of Ray's pods: python before_stop.py SECONDS.

Ray itself ends its processes at once. So this asks the jobs whose drivers run in this pod to stop, by SIGTERM, and
waits until neither a driver nor a Ray Train worker is left here, at most SECONDS. Then Ray is told.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time

import psutil

JOB = re.compile(r"(.*/)?jobs/\w+\.py")


def drivers() -> list[psutil.Process]:
    """The jobs themselves, without the shells that started them."""
    return [p for p, words in _commands() if any(JOB.fullmatch(word) for word in words[1:2])]


def workers() -> list[psutil.Process]:
    return [p for p, words in _commands() if "TrainWorker" in words[0]]


def _commands() -> list[tuple[psutil.Process, list[str]]]:
    found = psutil.process_iter(["cmdline", "status"])
    return [(p, p.info["cmdline"]) for p in found if p.info["cmdline"] and p.info["status"] != psutil.STATUS_ZOMBIE]


def main(seconds: float) -> None:
    end = time.monotonic() + seconds
    for driver in drivers():
        with contextlib.suppress(psutil.NoSuchProcess):
            driver.terminate()
    while (drivers() or workers()) and time.monotonic() < end:
        time.sleep(0.5)


if __name__ == "__main__":
    main(float(sys.argv[1]))
