"""The work of jobs/prepare.py: words in, a table of counts out."""

from __future__ import annotations

import signal
import sys

from cdr_dist import logs
from cdr_dist.data.counts import counts_table
from cdr_dist.data.prepare import check, options_from_words, prepare
from cdr_dist.data.prepare_options import with_scenario
from cdr_dist.data.scenarios import beside_paper, paper_counts


def prepare_job(words: list[str], only_check: bool = False) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = options_from_words(words)
    logs.configure("prepare", options.out)
    if only_check:
        there = check(options)
        print("the options and the inputs are in order" + ("; the dataset is there" if there else ""))
        return
    manifest = prepare(options)
    print(counts_table(manifest))
    scenario = with_scenario(words)[1]
    if scenario:
        print("\n" + beside_paper(manifest.counts, paper_counts(scenario)))
