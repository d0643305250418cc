"""Fixtures that several test files ask for; one thread a process, as two of them share the machine's cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there: idle threads of its pool wait by spinning

from tests.stores import folder, proxy, s3, store, undisturbed  # noqa: F401
