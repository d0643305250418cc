"""Names of the features of a batch, and what they tell.

user, source_user                     of a row; source_user is the user once more, for a table of its own
{target,source}_{item,category}       of a row
{target,source}_{brand,title,…}       the item's values in a declared column of the item file: a bag, summed
{target,source}_history_{item,…}      the same of the distinct items of the rows' histories
"""

from __future__ import annotations

import functools
import re

DOMAINS = ("target", "source")
ROW_FEATURES = ("user", "target_item", "target_category", "source_item", "source_category", "source_user")
HISTORY_FEATURES = tuple(f"{d}_history_{part}" for d in DOMAINS for part in ("item", "category"))
_HISTORY = "_history_"
_OWN_NAMES = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_TAKEN = ("user", "item", "category")


def vocabulary_of(feature: str) -> str:
    """Whose ids a feature takes."""
    return "user" if feature == "source_user" else feature.replace(_HISTORY, "_")


@functools.cache
def of_history(feature: str) -> bool:
    return _HISTORY in feature


def of_target_item(feature: str) -> bool:
    """Whether a feature is the target item's that a row asks about."""
    return feature.startswith("target_") and not of_history(feature)


def column_of(feature: str) -> str:
    """What it is of its item: item, category or a declared column; user."""
    domain, _, rest = feature.partition("_")
    return (rest if domain in DOMAINS else feature).removeprefix("history_")


@functools.cache
def is_bag(feature: str) -> bool:
    """Whether a row has any number of values, whose rows are summed, and not exactly one."""
    return column_of(feature) not in _TAKEN


def can_be_declared(column: str) -> bool:
    """Whether a column of an item file can be a feature by its name."""
    return bool(_OWN_NAMES.fullmatch(column)) and column not in _TAKEN and "history" not in column


def known(columns: dict[str, list[str]]) -> list[str]:
    """All features of a dataset; columns: domain -> declared columns."""
    declared = [f"{d}{of}_{c}" for d in DOMAINS for of in ("", "_history") for c in columns.get(d, [])]
    return [*ROW_FEATURES, *HISTORY_FEATURES, *declared]
