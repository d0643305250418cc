"""Runs methods x seeds and prints their table: mean, deviation, RelaImpr, paired tests.

    python jobs/experiment.py experiment=demo seeds=5 parallel=2
    python jobs/experiment.py experiment=amazon14_search data=DATASET seeds=1

experiment names a file of configs/experiment/. Options: experiment, methods (all; names with commas), seeds (5),
first_seed (8), parallel (1: processes at a time), out; any other key=value goes to every run, as in jobs/train.py.
Finished runs are not run again.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdr_dist.jobs import run_job


def main(words: list[str]) -> None:
    from cdr_dist.training.experiment import experiment_job

    experiment_job(words)


if __name__ == "__main__":
    sys.exit(run_job("experiment", __doc__, main))
