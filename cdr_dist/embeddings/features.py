"""Features and tables: several features of a batch may read one table, which is then looked up once.

A feature is a key of a KeyedJaggedTensor; `features` maps it to its table. Within a table the features' ids stand
one after the other, in the order of the KeyedJaggedTensor's keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cdr_dist.data.feature_names import is_bag

Features = Mapping[str, str]


class SideBySide(dict[str, Tensor]):
    """Name -> rows [n, width], which lie side by side in `whole` [n, names x width].

    A model that reads `whole` saves a copy of all rows, and one of their gradients.
    """

    def __init__(self, rows: Iterable[tuple[str, Tensor]], whole: Tensor) -> None:
        super().__init__(rows)
        self.whole = whole

    @classmethod
    def of(cls, whole: Tensor, names: Sequence[str]) -> SideBySide:
        rows = whole.view(len(whole), len(names), whole.shape[1] // len(names))
        return cls(zip(names, rows.unbind(1), strict=True), whole)


def ids_by_table(batch: KeyedJaggedTensor, features: Features) -> dict[str, Tensor]:
    """int64 ids [n] of each table, all features that read it one after the other."""
    found: dict[str, list[Tensor]] = {}
    for name, ids in zip(batch.keys(), batch.values().split(batch.length_per_key()), strict=True):
        if name in features:
            found.setdefault(features[name], []).append(ids)
    return {table: torch.cat(parts) if len(parts) > 1 else parts[0] for table, parts in found.items()}


def rows_by_feature(rows: Mapping[str, Tensor], batch: KeyedJaggedTensor, features: Features) -> dict[str, Tensor]:
    """Cuts each table's rows [n, width] into its features' rows, the inverse of `ids_by_table`; bags are summed."""
    feature = {features[name]: name for name in batch.keys() if name in features}
    bags = [name for name in batch.keys() if name in features and is_bag(name)]
    one_each = len(feature) == len([name for name in batch.keys() if name in features])
    if isinstance(rows, SideBySide) and one_each and not bags:
        return SideBySide(((feature[table], of) for table, of in rows.items()), rows.whole)
    out: dict[str, Tensor] = {}
    place = dict.fromkeys(rows, 0)
    for name, size in zip(batch.keys(), batch.length_per_key(), strict=True):
        table = features.get(name)
        if table is not None:
            whole = size == len(rows[table])
            out[name] = rows[table] if whole else rows[table][place[table] : place[table] + size]
            place[table] += size
    for name in bags:
        out[name] = _summed(out[name], batch[name].lengths())
    return out


def gradient_by_table(
    gradients: Mapping[str, Tensor], batch: KeyedJaggedTensor, features: Features
) -> dict[str, Tensor]:
    """The way back of `rows_by_feature`: features' gradients -> those of each table's rows [n, width]."""
    found: dict[str, list[Tensor]] = {}
    for name in batch.keys():
        if name in features:
            of = gradients[name]
            if is_bag(name):
                of = of.repeat_interleave(batch[name].lengths().long(), dim=0)
            found.setdefault(features[name], []).append(of)
    return {table: torch.cat(parts) if len(parts) > 1 else parts[0] for table, parts in found.items()}


def _summed(rows: Tensor, lengths: Tensor) -> Tensor:
    """Rows [total, width] of bags of so many [n] -> the sum of each, [n, width]; an empty one's is zero."""
    of = torch.arange(len(lengths), device=rows.device).repeat_interleave(lengths.long(), output_size=len(rows))
    return rows.new_zeros(len(lengths), rows.shape[1]).index_add(0, of, rows)
