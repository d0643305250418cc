"""The server that forks workers and jobs for the tests: one a test process; what it has imported, they find done."""

from __future__ import annotations

import multiprocessing as mp
import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

FORKS = mp.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.warm"])
SECONDS = 300


class Ended(NamedTuple):
    code: int
    out: str
    error: str


def python(words, folder=".", **environment):
    """What `python SCRIPT WORDS…` in this folder would do, without the imports: most of the time of a short job."""
    with tempfile.TemporaryDirectory() as screens:
        out, error = (Path(screens, name) for name in ("out", "error"))
        given = [str(word) for word in words]
        process = FORKS.Process(target=_script, args=(given, str(folder), dict(os.environ) | environment, out, error))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            raise AssertionError(f"{given}: no end within {SECONDS} s\n{error.read_text()}")
        return Ended(process.exitcode, out.read_text(), error.read_text())


def _script(words, folder, environment, *screens):
    for number, screen in enumerate(screens, 1):
        with screen.open("w") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).resolve().parent))
    runpy.run_path(words[0], run_name="__main__")
