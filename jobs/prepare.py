"""Raw logs -> dataset folder.

    python jobs/prepare.py format=table source=beauty.tsv.gz target=sports.tsv.gz out=data/beauty-sports
    python jobs/prepare.py source=events.csv columns.domain=app source_domain=news target_domain=tv out=data/news-tv

Prints a table of counts. A dataset that is there already with the same options is kept. With --check only the options,
the inputs and the output folder are checked.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdr_dist.data.prepare_options import describe_options
from cdr_dist.jobs import run_job


def main(words: list[str]) -> None:
    from cdr_dist.data.prepare_job import prepare_job

    prepare_job([w for w in words if w != "--check"], only_check="--check" in words)


if __name__ == "__main__":
    sys.exit(run_job("prepare", __doc__, main, lambda: "Options, as name=value:\n" + describe_options()))
