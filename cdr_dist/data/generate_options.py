"""The options of a generated dataset."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cdr_dist.data.prepare_options import PrepareOptions
from cdr_dist.data.words import check, described, fields_of, option, values_of
from cdr_dist.errors import nearest

NOT_CONTENT = ("out", "workers")
MOST_ITEMS = 2**31 - 3
"""Ids are int32, two of them reserved."""


@dataclass(frozen=True)
class GenerateOptions:
    """Sizes and shape. UserError on a value that is out of range."""

    out: str = option("", "folder of the dataset, local or a URI; must not hold anything else")
    users: int = option(2_000_000, "users; all of them have behaviours in both domains")
    source_items: int = option(5_000_000, "items of the source domain")
    target_items: int = option(5_000_000, "items of the target domain")
    source_categories: int = option(1000, "categories of the source items")
    target_categories: int = option(1000, "categories of the target items")
    source_behaviours: int = option(24_000_000, "source behaviours, about; geometric over users")
    target_behaviours: int = option(10_000_000, "target behaviours, about: the examples of all splits; likewise")
    longest: int = option(50, "most behaviours of a user in a domain")
    exponent: float = option(1.0, "of Zipf's law: an item's popularity is 1 / rank^exponent")
    certainty: float = option(0.8, "probability that a label follows the user's taste (labels=rating)")
    labels: str = option("rating", "rating: labels 0 and 1 are stored; sampled: all 1, negatives are drawn")
    eval_negatives: int = option(1, "negatives stored with a validation or test row (labels=sampled)")
    seed: int = option(8, "seed of every draw")
    rows_per_shard: int = option(1_000_000, "rows of an output file, about")
    workers: int = option(0, "0: in this process; N: N Ray tasks at a time. The bytes are the same")

    def __post_init__(self) -> None:
        check(bool(self.out), "out= is missing")
        check(
            self.labels in ("rating", "sampled"), f"labels={self.labels}: {nearest(self.labels, ['rating', 'sampled'])}"
        )
        for name in ("users", "longest", "eval_negatives", "rows_per_shard"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: must be 1 or more")
        check(self.workers >= 0, f"workers={self.workers}: must be 0 or more")
        check(0 <= self.exponent <= 3, f"exponent={self.exponent}: must be between 0 and 3")
        check(0.5 <= self.certainty <= 1, f"certainty={self.certainty}: must be between 0.5 and 1")
        for role in ("source", "target"):
            items, categories = getattr(self, f"{role}_items"), getattr(self, f"{role}_categories")
            check(1 <= items <= MOST_ITEMS, f"{role}_items={items}: must be 1 to {MOST_ITEMS}")
            check(1 <= categories <= items, f"{role}_categories={categories}: must be 1 to {role}_items={items}")
            behaviours = getattr(self, f"{role}_behaviours")
            at_most = self.users * self.longest // 2
            check(
                self.users <= behaviours <= at_most,
                f"{role}_behaviours={behaviours}: must be users={self.users} to users x longest / 2 = {at_most}",
            )
        check(self.users <= MOST_ITEMS, f"users={self.users}: must be at most {MOST_ITEMS}")

    def prepared(self) -> PrepareOptions:
        """What prepare would have been told."""
        return PrepareOptions(
            source="generated",
            target="generated",
            out=self.out,
            labels=self.labels,
            eval_negatives=self.eval_negatives,
            history_length=self.longest,
            candidates=self.longest,
            seed=self.seed,
        )

    def content(self) -> dict[str, Any]:
        """The options that decide the bytes."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_CONTENT}


def options_from_words(words: list[str]) -> GenerateOptions:
    return GenerateOptions(**values_of(words, fields_of(GenerateOptions)))


def describe_options() -> str:
    return "\n".join(described(fields_of(GenerateOptions), ("out",)))
