"""Names of the features of a batch, and what they tell.

user, source_user                     of a row; source_user is the user once more, for a table of its own
{target,source}_{item,category}       of a row
source_next                           of a row: source_item once more, for the table of what is predicted
{target,source}_{brand,title,…}       the item's values in a declared column of the item file: a bag, summed
user_{age,region,…}                   the user's in a declared column of the user file, likewise
{target,source}_history_{item,…}      the same of the distinct items of the rows' histories
source_history_next                   source_history_item once more, for the table of what is predicted
{target,source}_softmax               of no row: the candidates of a softmax, which all rows of a global batch share
"""

from __future__ import annotations

import functools
import re

DOMAINS = ("target", "source")
USER = "user"
ROW_FEATURES = (
    "user",
    "target_item",
    "target_category",
    "source_item",
    "source_category",
    "source_user",
    "source_next",
)
NEXT = "source_history_next"
HISTORY_FEATURES = (*(f"{d}_history_{part}" for d in DOMAINS for part in ("item", "category")), NEXT)
SHARED_FEATURES = tuple(f"{d}_softmax" for d in DOMAINS)
_HISTORY = "_history_"
_OWN_NAMES = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_TAKEN = ("user", "item", "category")
_ONCE_MORE = {"source_user": "user", "source_next": "source_item", NEXT: "source_history_item"}
"""Features that take the ids of another one, for a table of their own."""
_ONCE_MORE |= {feature: feature.replace("softmax", "item") for feature in SHARED_FEATURES}


def vocabulary_of(feature: str) -> str:
    """Whose ids a feature takes."""
    return _ONCE_MORE.get(feature, feature).replace(_HISTORY, "_")


def is_shared(feature: str) -> bool:
    """Whether it is of no row."""
    return feature in SHARED_FEATURES


@functools.cache
def of_history(feature: str) -> bool:
    return _HISTORY in feature


def of_target_item(feature: str) -> bool:
    """Whether a feature is the target item's that a row asks about."""
    return feature.startswith("target_") and not of_history(feature) and not is_shared(feature)


def column_of(feature: str) -> str:
    """What it is of its item or user: item, category or a declared column; user."""
    of, _, rest = (feature := _ONCE_MORE.get(feature, feature)).partition("_")
    return (rest if of in (*DOMAINS, USER) and rest else feature).removeprefix("history_")


@functools.cache
def is_bag(feature: str) -> bool:
    """Whether a row has any number of values, whose rows are summed, and not exactly one."""
    return column_of(feature) not in _TAKEN


def can_be_declared(column: str) -> bool:
    """Whether a column of an item or user file can be a feature by its name."""
    return bool(_OWN_NAMES.fullmatch(column)) and column not in (*_TAKEN, "next", "softmax") and "history" not in column


def known(columns: dict[str, list[str]]) -> list[str]:
    """All features of a dataset; columns: domain or user -> declared columns."""
    declared = [f"{d}{of}_{c}" for d in DOMAINS for of in ("", "_history") for c in columns.get(d, [])]
    declared += [f"{USER}_{c}" for c in columns.get(USER, [])]
    return [*ROW_FEATURES, *HISTORY_FEATURES, *SHARED_FEATURES, *declared]
