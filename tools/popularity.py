"""What the most popular items are worth: the full ranking of a split by how often an item was liked in training.

    python tools/popularity.py data=… [split=test] [ks=5,10]

The metrics are those of `evaluation.full_ks` with evaluation.full_exclude=train, as JSON.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.demo import dataset_of
from cdr_dist.data.words import check, words_of
from cdr_dist.evaluation.popularity import full_ranking
from cdr_dist.jobs import run_job


def main(words: list[str]) -> None:
    options = {"split": "test", "ks": "5,10"} | words_of(words, ("data", "split", "ks"))
    check("data" in options, "data= is missing; see --help")
    check(options["split"] in ("valid", "test"), f"split={options['split']}: choose valid or test")
    check(re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", options["ks"]) is not None, f"ks={options['ks']}: write 5,10")
    folder = dataset_of(options["data"])
    ks = [int(k) for k in options["ks"].split(",")]
    print(json.dumps(full_ranking(folder, read_manifest(folder), options["split"], ks), indent=1))


if __name__ == "__main__":
    sys.exit(run_job("popularity", __doc__, main))
