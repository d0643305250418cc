"""The main job on a fresh machine: demo data, CoNet plain and with BIAO on two Ray workers, and a table.

    make train
    python jobs/demo.py out=runs/demo trainer.workers=2

`out` is where the runs go; any other key=value goes to both runs, as in jobs/train.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdr_dist.jobs import run_job


def main(words: list[str]) -> None:
    from cdr_dist.training.demo_job import demo_job

    demo_job(words)


if __name__ == "__main__":
    sys.exit(run_job("demo", __doc__, main))
