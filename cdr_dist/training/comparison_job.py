"""The work of jobs/compare.py: two runs in, a text and a page out."""

from __future__ import annotations

from collections.abc import Sequence

from cdr_dist.data import storage
from cdr_dist.data.words import words_of
from cdr_dist.errors import UserError
from cdr_dist.evaluation.report import page
from cdr_dist.training.comparison import compare, text
from cdr_dist.training.run_folder import RunFolder


def comparison_job(words: Sequence[str]) -> None:
    """Words: a=, b= (needed), out= (the page)."""
    given = {"out": "compare.html"} | words_of(words, ("a", "b", "out"))
    for name in ("a", "b"):
        if not given.get(name):
            raise UserError(f"{name}= is missing; see --help")
    report = compare(RunFolder(given["a"]), RunFolder(given["b"]))
    storage.write_bytes(given["out"], page(report).encode())
    print(f"{text(report)}\n\n{given['out']}")
