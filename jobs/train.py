"""Trains a cross-domain recommender.

    python jobs/train.py data=demo recipe=biao seed=8 run=runs/biao
    python jobs/train.py data=s3://bucket/dataset recipe=joint trainer.workers=4 run=/shared/runs/joint
    python jobs/train.py data=demo recipe=biao trainer.workers=0 --check

The same `run` continues where it stopped; a finished one says so. --check checks configuration, data, plan and
memory and starts nothing. RAY_ADDRESS names a cluster; without it a local one is started.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdr_dist.help import describe_options
from cdr_dist.jobs import run_job


def main(words: list[str]) -> None:
    from cdr_dist.training.job import train_job

    train_job([w for w in words if w != "--check"], check="--check" in words)


if __name__ == "__main__":
    sys.exit(run_job("train", __doc__, main, describe_options))
