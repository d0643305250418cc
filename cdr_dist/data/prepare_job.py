"""The work of jobs/prepare.py: words in, a table of counts out."""

from __future__ import annotations

import logging
import signal
import sys

from cdr_dist.data.counts import counts_table
from cdr_dist.data.prepare import check, options_from_words, prepare


def prepare_job(words: list[str], only_check: bool = False) -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("cdr_dist").setLevel(logging.INFO)  # the clients of object stores have much to say, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = options_from_words(words)
    if only_check:
        there = check(options)
        print("the options and the inputs are in order" + ("; the dataset is there" if there else ""))
        return
    print(counts_table(prepare(options)))
