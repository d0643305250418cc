"""Fixtures that several test files ask for; one thread a process, and the longest files first.

Three processes share the two cores of a small machine (make test), a file at a time: some tests only wait.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there: idle threads of its pool wait by spinning

from tests.stores import folder, proxy, s3, store, undisturbed  # noqa: F401

LONGEST = ["crashes", "resume", "ray_submit", "forget", "experiment", "object_store_jobs", "prepare", "nightly"]
LONGEST += ["history_backbones", "tutorial", "accumulation", "train_errors", "report", "recommend", "full_ranking"]


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))
