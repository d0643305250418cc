"""The work of jobs/forget.py: words in, a table of what was removed out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from cdr_dist.data.words import check, described, fields_of, option, values_of
from cdr_dist.evaluation.table import markdown
from cdr_dist.production.forget import Places, Removed, forget
from cdr_dist.production.recommendation_job import keys_in
from cdr_dist.training.launch import quiet_libraries


@dataclass(frozen=True)
class ForgetOptions:
    """Whom to remove, and from where; several places of one kind with commas."""

    user: str = option("", "the user's id as in the logs, or several with commas")
    users: str = option("", "instead a file of ids, one a line or a Parquet column user_id")
    out: str = option("", "folder of jobs/nightly.py: all datasets, runs, nights and recommendations in it")
    data: str = option("", "dataset folders")
    run: str = option("", "run folders")
    recommendations: str = option("", "folders of jobs/recommend.py")

    def __post_init__(self) -> None:
        check(bool(self.user) != bool(self.users), "give either user=KEY or users=FILE; see --help")
        places = (self.out, self.data, self.run, self.recommendations)
        check(any(places), "give out=, data=, run= or recommendations=: where to remove them from; see --help")

    def keys(self) -> list[str]:
        """Each once. UserError: a file that is none."""
        found = keys_in(self.users, "users")
        keys = list(dict.fromkeys(_parts(self.user) if found is None else found.to_pylist()))
        check(bool(keys), f"user={self.user}: names nobody")
        return keys

    def places(self) -> Places:
        return Places(self.out, _parts(self.data), _parts(self.run), _parts(self.recommendations))


def describe_options() -> str:
    return "\n".join(described(fields_of(ForgetOptions)))


def forget_job(words: Sequence[str]) -> None:
    logging.basicConfig(format="%(message)s")
    options = ForgetOptions(**values_of(list(words), fields_of(ForgetOptions)))
    quiet_libraries()
    keys = options.keys()
    print(told(forget(keys, options.places()), len(keys)))


def told(removed: list[Removed], users: int) -> str:
    """The outcome, without a key: it may stand in a log."""
    if not removed:
        return "nothing was removed: gone from here already"
    rows = [[one.where, one.what, f"{one.number:,}"] for one in removed]
    head = f"{users:,} user{'s' * (users > 1)} removed; the raw logs, exported files and backups are not touched"
    return f"{head}\n\n{markdown(['where', 'what', 'removed'], rows, left=2)}"


def _parts(text: str) -> list[str]:
    return [part for part in text.split(",") if part]
