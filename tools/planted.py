"""Writes planted data of a shape: a dataset whose truth is known (docs/demo-data.md).

    python tools/planted.py out=runs/planted/harmful-8 harmful=8
    python tools/planted.py out=runs/planted/only-helpful neutral=0 harmful=0 seed=101

Any field of the shape may be given (cdr_dist/data/synthetic.py), the others are the demo's. What is there of the
same shape is kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdr_dist.data.demo import write_planted
from cdr_dist.data.synthetic import Planted
from cdr_dist.data.words import apart, fields_of, values_of
from cdr_dist.errors import UserError
from cdr_dist.jobs import run_job


def main(words: list[str]) -> None:
    own, rest = apart(words, {"out": ""})
    if not own["out"]:
        raise UserError("give out=FOLDER")
    shape = Planted(**values_of(rest, fields_of(Planted)))
    manifest = write_planted(shape, own["out"])
    print(f"{own['out']}: {manifest.counts['users']:,} users, categories: {', '.join(_kinds(shape))}")


def _kinds(shape: Planted) -> list[str]:
    return [f"{getattr(shape, kind)} {kind}" for kind in ("helpful", "neutral", "harmful")]


if __name__ == "__main__":
    sys.exit(run_job("planted", __doc__, main))
