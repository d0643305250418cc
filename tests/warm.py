"""Loaded once by the server of tests/forks.py: what a job imports and compiles late, it finds done.

No thread may be running here: forks would not have it.
"""

from __future__ import annotations

import numpy as np
import pandas  # noqa: F401
import pyarrow.dataset  # noqa: F401

import cdr_dist.data.prepare_job
import cdr_dist.models.conet
import cdr_dist.training.accumulation
import cdr_dist.training.evaluation_job
import cdr_dist.training.job
import cdr_dist.training.lower
import cdr_dist.training.report
import cdr_dist.training.upper
import cdr_dist.training.weighting
import cdr_dist.training.worker  # noqa: F401
from cdr_dist.configuration import from_words
from cdr_dist.data import scattered

for recipe in ("joint", "biao"):
    from_words(["data=none", "run=none", f"recipe={recipe}", "trainer.workers=0"])
for kind in (np.int32, np.int64, np.float32):
    scattered.Scattered([np.zeros(1, dtype=kind)]).gather(np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.int64))
