"""The options of jobs/recommend.py."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cdr_dist.data.words import check, described, fields_of, option, values_of
from cdr_dist.errors import nearest

ALL_UP_TO = 20_000
"""Items up to which candidates=auto scores all of them."""
AUTO = 500


@dataclass(frozen=True)
class ListOptions:
    """Whom to recommend how much of what."""

    top: int = option(20, "items for each user, at most")
    users: str = option("", "file of user ids, one a line or a Parquet column user_id; empty: all users of the dataset")
    items: str = option("", "file of item ids that may be recommended, one a line or a Parquet column item_id")
    seen: str = option("drop", "drop: not what a user has had to do with already; keep: that as well")
    new_items: bool = option(
        False, "also items that no training row had, of which the model knows nothing of their own"
    )
    per_category: int = option(0, "most items of one category for a user; 0: any number")
    candidates: str = option(
        "auto", f"items scored for each user: all, or a number; auto: all of up to {ALL_UP_TO:,} items, else {AUTO}"
    )
    recall_users: int = option(128, "users for whom candidates are compared with all items; about")

    def __post_init__(self) -> None:
        for name, least in (("top", 1), ("per_category", 0), ("recall_users", 1)):
            check(getattr(self, name) >= least, f"{name}={getattr(self, name)}: must be {least} or more")
        check(self.seen in ("drop", "keep"), f"seen={self.seen}: {nearest(self.seen, ['drop', 'keep'])}")
        given = self.candidates
        number = int(given) if given.isascii() and given.isdigit() else 0
        check(given in ("auto", "all") or number >= 1, f"candidates={given}: all, auto or a number of 1 or more")
        check(not number or number >= self.top, f"candidates={given}: fewer than top={self.top}")

    def candidates_of(self, items: int) -> int:
        """How many of so many items are scored for a user; 0: all."""
        if self.candidates == "all" or (self.candidates == "auto" and items <= ALL_UP_TO):
            return 0
        wanted = max(AUTO, 4 * self.top) if self.candidates == "auto" else int(self.candidates)
        return wanted if wanted < items else 0


@dataclass(frozen=True)
class RecommendOptions(ListOptions):
    """And of which run, from where and to where."""

    run: str = option("", "folder of the finished run, local or a URI")
    out: str = option("", "folder of the recommendations, local or a URI")
    data: str = option("", "a dataset that the run's own was extended to; empty: the run's own")
    workers: int | None = option(None, "workers; empty: as many as trained the run; 0: in this process")

    def __post_init__(self) -> None:
        for name in ("run", "out"):
            check(bool(getattr(self, name)), f"{name}= is missing; see --help")
        check(self.workers is None or self.workers >= 0, f"workers={self.workers}: must be 0 or more")
        super().__post_init__()

    def content(self) -> dict[str, Any]:
        """What decides the recommendations."""
        return {name: value for name, value in asdict(self).items() if name not in ("out", "workers")}


def options_from_words(words: list[str]) -> RecommendOptions:
    return RecommendOptions(**values_of(words, fields_of(RecommendOptions)))


def describe_options() -> str:
    return "\n".join(described(fields_of(RecommendOptions), ("run", "out")))
