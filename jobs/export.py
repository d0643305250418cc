"""A finished run as files that a serving system reads without cdr_dist: embeddings as Parquet, the scorer as a program.

    python jobs/export.py run=runs/biao-8 out=runs/biao-8-export

OUT/tables/NAME/*.parquet: id, key, vector of every user, item and category. OUT/vocab: the items' categories.
OUT/scorer.pt2, by torch.export: embeddings in, logits out. OUT/export.json: which embeddings, in which shapes.
docs/serving.md shows a program that loads and scores.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdr_dist.jobs import run_job


def main(words: list[str]) -> None:
    from cdr_dist.production.export_job import export_job

    export_job(words)


def options() -> str:
    from cdr_dist.production.export_job import describe_options

    return describe_options()


if __name__ == "__main__":
    sys.exit(run_job("export", __doc__, main, options))
