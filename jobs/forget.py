"""Removes a person from what this project wrote: datasets, runs, nights and recommendations.

    python jobs/forget.py user=A1B2C3 out=s3://models/films                       # all that jobs/nightly.py wrote there
    python jobs/forget.py user=A1B2C3 data=data/books-films run=runs/joint,runs/biao recommendations=runs/top20
    python jobs/forget.py users=asked-to-go.txt out=s3://models/films

Prints what was removed from where. The same command goes on after a crash, and says so where all is gone already; a
user whom nobody knows is a mistake (exit code 2), and then nothing is removed. A dataset remembers by a salted hash
whom it has forgotten, and a dataset on top of it (extends=, as every night's) leaves them out. What stays: the raw
logs, what other parameters learned, exported files, backups (docs/forget.md).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdr_dist.jobs import run_job


def main(words: list[str]) -> None:
    from cdr_dist.production.forget_job import forget_job

    forget_job(words)


def options() -> str:
    from cdr_dist.production.forget_job import describe_options

    return describe_options()


if __name__ == "__main__":
    sys.exit(run_job("forget", __doc__, main, options))
