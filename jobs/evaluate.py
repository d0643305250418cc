"""Evaluates a run's best checkpoint again.

    python jobs/evaluate.py run=runs/biao-8
    python jobs/evaluate.py run=runs/biao-8 split=valid scores=scores.parquet
    python jobs/evaluate.py run=runs/biao-8 full_ks=10,50
    python jobs/evaluate.py run=runs/monday data=data/tuesday

Prints the metrics as JSON: the same as in the run's summary.json, whatever number of workers trained it. split is
valid or test (the default); scores names a Parquet file for every row's user, example, label and score. full_ks
ranks every positive among all target items: full_hr@K, full_ndcg@K, full_mrr@K; full_exclude=train leaves those out
that its user trained on, none does not; both are the run's own unless given. A run of recipe=pretrain has nll, the
loss of the next item, and nothing else. data names a dataset that the run's own
was extended to (prepare's extends=): an old model on new days.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdr_dist.jobs import run_job


def main(words: list[str]) -> None:
    from cdr_dist.training.evaluation_job import evaluation_job

    evaluation_job(words)


if __name__ == "__main__":
    sys.exit(run_job("evaluate", __doc__, main))
