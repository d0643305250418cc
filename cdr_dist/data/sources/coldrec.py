"""format=coldrec: the data of PeterRec and UAF, `s1,...,sn,,t1,t2,...`: a user's source items, then their target items.

Source items are padded with 0 on the left; a 0 elsewhere is an unknown item. The rows' domains are `source` and
`target`, and all of a line's source behaviours are earlier than its target behaviours.
"""

from __future__ import annotations

from cdr_dist.data.sources.records import shown
from cdr_dist.data.sources.user_lines import Behaviours, UserLines
from cdr_dist.errors import UserError

KINDS = (".csv", ".csv.gz", ".txt", ".txt.gz")
PADDING = "0"


def _behaviours(line: str) -> Behaviours:
    source, gap, target = line.partition(",,")
    if not gap:
        raise UserError("no ',,' between source and target items")
    if not target:
        raise UserError("no target item")
    if not source:
        raise UserError("the source sequence is empty")
    padded, targets = source.split(","), target.split(",")
    first = next((place for place, item in enumerate(padded) if item != PADDING), len(padded))
    items = padded[first:]
    if not items:
        raise UserError("the source sequence is all padding")
    for item in (*items, *targets):
        if not (item.isdecimal() and item.isascii()):
            raise UserError(f"{shown(item)} is not a whole number")
    return items + targets, ["source"] * len(items) + ["target"] * len(targets)


SOURCE = UserLines(KINDS, "s1,...,sn,,t1,t2,...", _behaviours)
