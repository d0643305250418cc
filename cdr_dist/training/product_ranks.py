"""Ranks of rows among all items where logits are a matrix product (`PairScorer.matrix`): tile by tile.

A tile of scores is counted while it lies in the cache. Every tile has one shape, the last ones filled up, and a row's
own score comes from such a tile as well: a product's bits depend on its shape, and at the edges of a shape on the place
within it, so that items with equal rows would tie by chance only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdr_dist.compiled import compiled
from cdr_dist.errors import UserError
from cdr_dist.models.pairs import ByProduct

TILE_ROWS, TILE_ITEMS = 576, 1152
"""2.5 MiB of float32. Multiples of 192, so that no kernel of a product (8, 16, 24, 48 at a time) has an edge in it."""
SHRINK = 0.9
"""Rows are packed anew when at most this share of them is still open."""

Ints = NDArray[np.int64]
Parts = Callable[[], Iterable[Tensor]]
"""Item parts [.., q] in the items' order, each time it is called."""


def ranks_by_product(
    scorer: ByProduct, part: Tensor, own: Tensor, column: Ints, barred: tuple[Ints, Ints], parts: Parts, most: int
) -> tuple[Tensor, Tensor]:
    """Items above each row's own one and tied with it, itself included, [n] each; exact until `most` stand above it.

    part [n, p]; column [n]: the place of a row's own item, -1: it is none of them, and scores `own` [n]; barred: (rows,
    places) of items that do not count, the own one aside. UserError: a score that is not finite.
    """
    own = _own(scorer, part, own, column, parts)
    row, place = _distinct(np.concatenate([np.arange(len(column)), barred[0]]), np.concatenate([column, barred[1]]))
    above = torch.zeros(len(part), dtype=torch.int64, device=part.device)
    tied = torch.ones_like(above)
    open_rows, now = torch.arange(len(part), device=part.device), np.arange(len(part))
    for first, items, real in _tiles(parts()):
        kept = above[open_rows] < most
        if int(kept.sum()) <= SHRINK * len(kept):
            open_rows, part, own = open_rows[kept], part[kept], own[kept]
            now = np.full(len(above), -1)
            now[open_rows.cpu().numpy()] = np.arange(len(open_rows))
        a, b = np.searchsorted(place, [first, first + real])
        out_row, out_place = now[row[a:b]], place[a:b] - first
        order = np.argsort(out_row, kind="stable")
        out_row, out_place = out_row[order], out_place[order]
        for start in range(0, len(part), TILE_ROWS):
            c, d = np.searchsorted(out_row, [start, start + TILE_ROWS])
            some = slice(start, start + TILE_ROWS)
            scores = scorer.matrix(filled(part[some], TILE_ROWS), items)
            scores[torch.from_numpy(out_row[c:d] - start), torch.from_numpy(out_place[c:d])] = torch.nan
            more, equal, finite = _counted(scores, own[some], real)
            if finite != len(own[some]) * real - (d - c):
                raise UserError("scores are not finite: the model has diverged")
            above[open_rows[some]] += more
            tied[open_rows[some]] += equal
    return above, tied


def _own(scorer: ByProduct, part: Tensor, own: Tensor, column: Ints, parts: Parts) -> Tensor:
    """Each row's score with its own item [n]: of a tile that the item stands in where all others see it."""
    own, order = own.clone(), np.argsort(column, kind="stable")
    for first, items, real in _tiles(parts()):
        a, b = np.searchsorted(column[order], [first, first + real])
        for start in range(a, b, TILE_ROWS):
            some = torch.from_numpy(order[start : min(start + TILE_ROWS, b)]).to(part.device)
            scores = scorer.matrix(filled(part[some], TILE_ROWS), items)
            place = torch.from_numpy(column[some.cpu().numpy()] - first).to(part.device)
            own[some] = scores[: len(some)].gather(1, place[:, None]).squeeze(1)
    return own


def _tiles(parts: Iterable[Tensor]) -> Iterator[tuple[int, Tensor, int]]:
    """(place of the first item, item part [TILE_ITEMS, q], how many of them are items)."""
    first = 0
    for part in parts:
        for items in part.split(TILE_ITEMS):
            yield first, filled(items, TILE_ITEMS), len(items)
            first += len(items)


def filled(rows: Tensor, size: int) -> Tensor:
    """With rows of zeros behind, so that there are `size`."""
    if len(rows) == size:
        return rows.contiguous()
    whole = rows.new_zeros(size, rows.shape[1])
    whole[: len(rows)] = rows
    return whole


def _distinct(row: Ints, place: Ints) -> tuple[Ints, Ints]:
    """The pairs, each once, by place and then by row."""
    rows = int(row.max(initial=0)) + 1
    codes = np.sort(place * rows + row)
    codes = codes[np.diff(codes, prepend=codes[:1] - 1) > 0]
    return codes % rows, codes // rows


def _counted(scores: Tensor, own: Tensor, real: int) -> tuple[Tensor, Tensor, int]:
    """Of rows [n] of a tile: scores above own [n], equal to it, and how many are finite in all."""
    if scores.device.type != "cpu":
        scores, own = scores[: len(own), :real], own[:, None]
        finite = int(torch.isfinite(scores).sum())
        return (scores > own).sum(1), (scores == own).sum(1), finite
    above, tied = np.empty((2, len(own)), dtype=np.int64)
    finite = _count(scores.numpy(), own.numpy(), real, above, tied)
    return torch.from_numpy(above), torch.from_numpy(tied), finite


@compiled()
def _count(scores: NDArray, own: NDArray, real: int, above: Ints, tied: Ints) -> int:
    finite = 0
    for i in range(len(own)):
        mine, more, equal = own[i], 0, 0
        for j in range(real):
            score = scores[i, j]
            more += score > mine
            equal += score == mine
            finite += np.abs(score) < np.inf
        above[i], tied[i] = more, equal
    return finite
