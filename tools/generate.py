"""Writes a large dataset to train on, straight as shards: for capacity and speed, not for quality.

    python tools/generate.py out=data/zipf-10m workers=2
    python tools/generate.py out=data/zipf users=2000 source_items=3000 target_items=2000 \\
        source_categories=30 target_categories=20 source_behaviours=20000 target_behaviours=12000

A dataset that is there already with the same options is kept. The bytes depend on the options only.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdr_dist.data.counts import counts_table
from cdr_dist.data.generate import generate
from cdr_dist.data.generate_options import describe_options, options_from_words
from cdr_dist.jobs import run_job


def main(words: list[str]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clears the unfinished folder away
    print(counts_table(generate(options_from_words(words))))


if __name__ == "__main__":
    sys.exit(run_job("generate", __doc__, main, lambda: "Options, as name=value:\n" + describe_options()))
