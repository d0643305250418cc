"""format=windows: watching sequences, `partition TAB items TAB domains`, the lists with commas and of one length.

The partition is not read. An item -1 is unknown.
"""

from __future__ import annotations

from cdr_dist.data.sources.user_lines import Behaviours, UserLines
from cdr_dist.errors import UserError

KINDS = (".tsv", ".tsv.gz", ".txt", ".txt.gz")


def _behaviours(line: str) -> Behaviours:
    fields = line.split("\t")
    if len(fields) != 3:
        raise UserError(f"{len(fields)} fields between tabs, not 3")
    items, domains = (field.split(",") for field in fields[1:])
    if len(items) != len(domains):
        raise UserError(f"{len(items)} items, but {len(domains)} domains")
    for what, values in (("item", items), ("domain", domains)):
        if "" in values:
            raise UserError(f"{what} {values.index('') + 1} is empty")
    return items, domains


SOURCE = UserLines(KINDS, "partition TAB item,item,... TAB domain,domain,...", _behaviours)
