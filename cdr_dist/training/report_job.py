"""The work of jobs/report.py: a finished run's report.html, written again."""

from __future__ import annotations

from collections.abc import Sequence

from cdr_dist.data.demo import DEMOS, dataset_of, is_written
from cdr_dist.errors import UserError, nearest
from cdr_dist.training.report import write_report
from cdr_dist.training.run_folder import RunFolder

OPTIONS = ("run",)


def report_job(words: Sequence[str]) -> None:
    """Words: run= (needed). Prints where the report is."""
    given = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not separator:
            raise UserError(f"'{word}': options are written key=value")
        if name not in OPTIONS:
            raise UserError(f"{name}: unknown option; {nearest(name, list(OPTIONS))}")
        given[name] = value
    if not given.get("run"):
        raise UserError("run= is missing; see --help")
    place = RunFolder(given["run"])
    config = place.config()
    gone = config.data in DEMOS and not is_written(config.data)  # a report is no reason to write it
    print(write_report(place, None if gone else dataset_of(config.data)))
