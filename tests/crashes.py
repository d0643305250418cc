"""Jobs in processes of their own that die where a test says. They are forked after the imports: no seconds of start."""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
from pathlib import Path

from cdr_dist.jobs import run_job

_FORKS = mp.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["tests.crashes", "cdr_dist.training.job", "cdr_dist.training.worker", "cdr_dist.data.prepare_job"]
)
KILLED = -9
SECONDS = 120
"""A job that takes longer hangs."""


def job(name, main, given, crash="", screen="/dev/null", killed_after_s=None):
    """The exit code of `jobs/NAME.py WORDS`; crash: the point where it dies, as CDR_CRASH says it."""
    stores = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    process = _FORKS.Process(
        target=_run, args=(name, main, list(map(str, given)), stores | {"CDR_CRASH": crash}, str(screen))
    )
    process.start()
    if killed_after_s is not None:
        process.join(killed_after_s)
        process.kill()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"{name} {crash}: no end within {SECONDS} s")
    return process.exitcode


def _run(name, main, given, surroundings, screen):
    for name in [name for name in os.environ if name.startswith("AWS_")]:  # of when the server of forks began
        del os.environ[name]
    os.environ.update(surroundings)
    with Path(screen).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [f"{name}.py", *given]
    code = run_job(name, None, main)
    sys.stderr.flush()
    os._exit(code)
