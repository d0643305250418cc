"""The work of jobs/nightly.py: words in, what became of the night out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cdr_dist import logs
from cdr_dist.data.prepare import check
from cdr_dist.evaluation.table import markdown
from cdr_dist.production.gate import number
from cdr_dist.production.nightly import nightly
from cdr_dist.production.options import read_words
from cdr_dist.production.publishing import Publisher


def nightly_job(words: Sequence[str], only_check: bool = False) -> None:
    """A night that keeps the published model has done its work, too: no error."""
    request = read_words(words)
    logs.configure("nightly", f"{request.own.out}#{request.own.date}", "%(asctime)s %(message)s")
    if only_check:
        print(_checked(request))
        return
    print(told(nightly(request)))


def _checked(request: Any) -> str:
    publisher = Publisher(request.own.out)
    night = publisher.read_night(request.own.date)
    if night.get("outcome"):
        return f"{request.own.date}: done already, {night['outcome']}"
    latest = publisher.latest()
    check(request.prepare_options(publisher.dataset(request.own.date), night.get("extends", "")))
    return f"ok: {request.own.date}; published: {latest.date if latest else 'nothing yet'}"


def told(night: dict[str, Any]) -> str:
    """The outcome and the gate, for a log."""
    rows = [[c["name"], number(c["measured"]), c["threshold"], "yes" if c["holds"] else "NO"] for c in night["gate"]]
    head = f"{night['date']}: {'done already, ' if night.get('again') else ''}{night['outcome']}"
    difference = night.get("difference")
    tail = ""
    if difference:
        low, high = difference["low"], difference["high"]
        tail = f"\nAUC against the published model: {difference['difference']:+.4f} ({low:+.4f} … {high:+.4f})"
    return f"{head}\n\n{markdown(['gate', 'measured', 'wanted', 'holds'], rows, left=1)}{tail}"
