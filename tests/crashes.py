"""Jobs in processes of their own that die where a test says. They are forked after the imports: no seconds of start.

Besides, jobs that do what few jobs do, so that every crash point is passed, and a job whose effects are all recorded.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from pathlib import Path

from cdr_dist import crash_points
from cdr_dist.data.prepare_job import prepare_job
from cdr_dist.errors import UserError
from cdr_dist.jobs import run_job
from cdr_dist.training.job import train_job
from tests.forks import FORKS

KILLED = -9
SECONDS = 120
"""A job that takes longer hangs."""


def job(name, main, given, crash="", screen="/dev/null", killed_after_s=None):
    """The exit code of `jobs/NAME.py WORDS`; crash: the point where it dies, as CDR_CRASH says it."""
    stores = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    process = FORKS.Process(
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
    for old in [old for old in os.environ if old.startswith("AWS_")]:  # of when the server of forks began
        del os.environ[old]
    os.environ.update(surroundings)
    with Path(screen).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [f"{name}.py", *given]
    code = run_job(name, None, main)
    sys.stderr.flush()
    os._exit(code)


# ---- jobs out of the ordinary; what they change stays in their own process -------------------------------------------


def train_with_many_beats(words):
    from cdr_dist.training import lease

    lease.BEAT_S = 0.02
    train_job(words)


def train_until_interrupted(words):
    from cdr_dist.training.lower import Lower
    from cdr_dist.training.worker import StopWord

    run, told = Lower.run, []

    def interrupted(self, *given):
        if not told:
            os.kill(os.getpid(), signal.SIGINT)
        told.append(True)
        return run(self, *given)

    Lower.run = interrupted
    StopWord.wanted = lambda _: bool(told)  # at once: the thread that looks does so every second
    train_job(words)


def train_on_what_is_refused(words):
    from cdr_dist.training import worker

    def refuse(*_):
        raise UserError("refused")

    worker.verify = refuse
    train_job(words)


def prepare_what_is_refused(words):
    from cdr_dist.data import prepare

    def refuse(*_):
        raise UserError("refused")

    prepare._manifest = refuse
    prepare_job(words)


# ---- every change of a folder ----------------------------------------------------------------------------------------

_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def recorded(main, root, report):
    """A job that reports every change below `root`: a line `EFFECT CHANGE PATH`, where EFFECT may be `-`."""
    return functools.partial(_record, main, str(root), str(report))


def _record(main, root, report, words):
    """Python tells an audit hook of whatever opens, renames, removes or makes a file, whoever asks for it."""
    within, askers = {}, {}  # thread -> the effects it is in; thread -> who started it, and waits for it
    point, start = crash_points._point, threading.Thread.start
    out = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def passed(name):
        effect, _, side = name.rpartition(":")
        effects = within.setdefault(threading.current_thread(), [])
        if side == "before":
            effects.append(effect)
        elif effects:
            effects.pop()
        if name != os.environ.get("CDR_CRASH", "").removesuffix(":1"):
            os.write(out, f"{effect} {side} point\n".encode())
        point(name)

    def started(self):
        askers[self] = threading.current_thread()
        start(self)

    def hook(event, given):
        if event == "open":
            path, mode, flags = given
            changes = isinstance(path, str) and (flags & _WRITING or set(mode or "") & set("wax+"))
        else:
            path, changes = given[0] if given else None, event in _CHANGES
        if not changes or not str(path).startswith(root + "/"):
            return
        thread = threading.current_thread()
        effects = within.get(thread) or within.get(askers.get(thread)) or ["-"]
        os.write(out, f"{effects[-1]} {event} {os.path.relpath(path, root)}\n".encode())

    crash_points._point, threading.Thread.start = passed, started
    sys.addaudithook(hook)
    main(words)
