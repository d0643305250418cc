"""A batch's ids as KeyedJaggedTensors: features of one id a row, and behind them others of their own lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


def one_id_a_row(features: Mapping[str, NDArray]) -> KeyedJaggedTensor:
    names: Sequence[str] = list(features)
    return _ones(names, torch.from_numpy(np.concatenate([features[n] for n in names]).astype(np.int64)))


def of_any_length(features: Mapping[str, Tensor]) -> KeyedJaggedTensor:
    """One id a row, of a number of rows that differs between the features."""
    each = [len(of) for of in features.values()]
    return KeyedJaggedTensor(
        keys=list(features),
        values=torch.cat(list(features.values())),
        lengths=torch.ones(sum(each), dtype=torch.int32),
        length_per_key=each,
        stride_per_key_per_rank=[[n] for n in each],
    )


def with_more(features: KeyedJaggedTensor, more: Mapping[str, tuple[Tensor, Tensor | None]]) -> KeyedJaggedTensor:
    """Features of other numbers of rows behind those that a batch has: ids and their lengths (None: one id a row)."""
    ones = {f: torch.ones(len(ids), dtype=torch.int32) for f, (ids, _) in more.items()}
    lengths = [ones[f] if of is None else of for f, (_, of) in more.items()]
    each = features.length_per_key()
    return KeyedJaggedTensor(
        keys=[*features.keys(), *more],
        values=torch.cat([features.values(), *(ids for ids, _ in more.values())]),
        lengths=torch.cat([features.lengths(), *lengths]),
        length_per_key=[*each, *(len(ids) for ids, _ in more.values())],
        stride_per_key_per_rank=[[n] for n in [*each, *map(len, lengths)]],
    )


def split(train: KeyedJaggedTensor, sizes: Sequence[int]) -> list[KeyedJaggedTensor]:
    """Of one id a row: the next so many rows of each feature."""
    keys = train.keys()
    columns = train.values().view(len(keys), -1).split(list(sizes), dim=1)
    return [_ones(keys, values.reshape(-1)) for values in columns]


def _ones(keys: Sequence[str], values: Tensor) -> KeyedJaggedTensor:
    each = [len(values) // len(keys)] * len(keys)
    lengths = torch.ones(len(values), dtype=torch.int32)
    return KeyedJaggedTensor(keys=list(keys), values=values, lengths=lengths, length_per_key=each)
