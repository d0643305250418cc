"""Two finished runs side by side, as text and as a page: metrics, what differs, curves, weights, cost.

    python jobs/compare.py a=runs/joint b=runs/biao
    python jobs/compare.py a=s3://models/films/runs/2026-11-23 b=s3://models/films/runs/2026-11-24 out=nights.html

Where both were measured on the same test rows, the difference comes with an interval over users. out: the page
(compare.html).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdr_dist.jobs import run_job


def main(words: list[str]) -> None:
    from cdr_dist.training.comparison_job import comparison_job

    comparison_job(words)


if __name__ == "__main__":
    sys.exit(run_job("compare", __doc__, main))
