"""The work of jobs/report.py: a finished run's report.html, written again."""

from __future__ import annotations

from collections.abc import Sequence

from cdr_dist.data.demo import DEMOS, dataset_of, is_written
from cdr_dist.data.words import words_of
from cdr_dist.errors import UserError
from cdr_dist.training.report import write_report
from cdr_dist.training.run_folder import RunFolder

OPTIONS = ("run",)


def report_job(words: Sequence[str]) -> None:
    """Words: run= (needed). Prints where the report is."""
    given = words_of(words, OPTIONS)
    if not given.get("run"):
        raise UserError("run= is missing; see --help")
    place = RunFolder(given["run"])
    config = place.config()
    gone = config.data in DEMOS and not is_written(config.data)  # a report is no reason to write it
    print(write_report(place, None if gone else dataset_of(config.data)))
