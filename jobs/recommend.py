"""The best items for every user, as Parquet, from a finished run.

    python jobs/recommend.py run=runs/biao-8 out=runs/biao-8-top20
    python jobs/recommend.py run=s3://models/films/runs/2026-11-24 top=50 per_category=10 items=in-stock.txt \\
        out=s3://models/films/top50 workers=4

A row for each user of the dataset, of one log alone as well: user_id, by, item_id (a list, best first), score (a list).
by=model: score is the model's probability of a like. by=popularity: the model knows nothing of this user, and score is
the item's likes in training. What a user has had to do with already is left out, and so are items without a training
row. recommendations.json, written last, says how many, of how many items, and how many of the best items of all the
candidates held. The same command again does nothing; begun and killed, it begins anew.

--check says what would be done.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdr_dist.jobs import run_job


def main(words: list[str]) -> None:
    from cdr_dist.production.recommendation_job import recommendation_job

    recommendation_job([word for word in words if word != "--check"], only_check="--check" in words)


def options() -> str:
    from cdr_dist.production.recommendation_options import describe_options

    return describe_options()


if __name__ == "__main__":
    sys.exit(run_job("recommend", __doc__, main, options))
