"""Writes a finished run's report.html again.

    python jobs/report.py run=runs/biao-8

Training writes it at its end; this is for runs of earlier versions, and for those whose report could not be written.
The page holds all it needs. Names of categories and unseen shares come from the dataset, where it can be read.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdr_dist.jobs import run_job


def main(words: list[str]) -> None:
    from cdr_dist.training.report_job import report_job

    report_job(words)


if __name__ == "__main__":
    sys.exit(run_job("report", __doc__, main))
