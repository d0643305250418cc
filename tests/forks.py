"""The server that forks workers and jobs for the tests: one a test process; what it has imported, they find done."""

from __future__ import annotations

import multiprocessing as mp

FORKS = mp.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.warm"])
