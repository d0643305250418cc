"""The histories of a batch in one domain, by their distinct items: each is looked up, and projected, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdr_dist.compiled import compiled
from cdr_dist.data.lists import Lists
from cdr_dist.data.scattered import element
from cdr_dist.errors import UserError


@dataclass(frozen=True)
class History:
    """item, category: of the distinct items [u], in the order in which they first come; position [total]: which of them
    stands where, history after history; lengths [n]. All int64."""

    item: Tensor
    category: Tensor
    position: Tensor
    lengths: Tensor

    @classmethod
    def of_steps(cls, lists: Lists, sizes: Sequence[int], last: int, categories: NDArray[np.int32]) -> list[History]:
        """Those of so many rows each, a history being the `last` items of a list; no rows are one empty history.

        categories: of every item of the vocabulary.
        """
        edges = np.cumsum([0, *sizes])
        lengths = np.minimum(lists.lengths, last)
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])[edges]
        item, category, position = np.empty((3, ends[-1]), dtype=np.int64)
        distinct = np.zeros(len(sizes), dtype=np.int64)
        slots = np.empty(_slots(np.diff(ends).max(initial=0)), dtype=np.int32)
        where = (*lists.where, lengths, edges, ends)
        known = _distinct(*where, np.ascontiguousarray(categories), slots, item, category, position, distinct)
        if not known:
            raise UserError(f"an item in a history is none of the {len(categories)} rows of its vocabulary")
        of = [torch.from_numpy(each) for each in (item, category, position, lengths)]
        found = []
        for step, rows in enumerate(sizes):
            start, stop, unique = int(ends[step]), int(ends[step + 1]), int(ends[step] + distinct[step])
            own = of[3][edges[step] : edges[step + 1]] if rows else of[3].new_zeros(1)
            found.append(cls(of[0][start:unique], of[1][start:unique], of[2][start:stop], own))
        return found

    def __len__(self) -> int:
        return len(self.lengths)

    def some(self, start: int, stop: int) -> History:
        """Histories start..stop-1, of the same distinct items."""
        first, last = (int(self.lengths[:n].sum()) for n in (start, stop))
        return History(self.item, self.category, self.position[first:last], self.lengths[start:stop])

    def padded(self) -> tuple[Tensor, Tensor]:
        """Where the distinct items stand, [n, longest] (0 behind the end of a history), and what is no padding."""
        longest = int(self.lengths.max()) if len(self.lengths) else 0
        real = torch.arange(longest, device=self.lengths.device) < self.lengths.unsqueeze(1)
        return torch.zeros_like(real, dtype=torch.int64).masked_scatter_(real, self.position), real

    def before(self, ends: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """As `padded`, of the `most` positions before `ends`, a multiple of len(self): rows after one another share a
        history."""
        copies = len(ends) // len(self)
        size = min(most, int(ends.max())) if len(ends) else 0
        within = ends.unsqueeze(1) - size + torch.arange(size, device=ends.device)
        within = within + (size - ends).clamp(min=0).unsqueeze(1)  # a short one begins in the first column
        real = within < ends.unsqueeze(1)
        first = (self.lengths.cumsum(0) - self.lengths).repeat_interleave(copies).unsqueeze(1)
        place = torch.zeros_like(within).masked_scatter_(real, self.position[(first + within)[real]])
        return place, real

    def to(self, device: torch.device) -> History:
        return History(*(of.to(device) for of in vars(self).values()))


def _slots(items: int) -> int:
    """A power of two that leaves at least half of the slots free."""
    return 1 << max(4, (2 * int(items)).bit_length())


@compiled()
def _distinct(
    addresses: Any,
    like: Any,
    place: Any,
    starts: Any,
    whole: Any,
    lengths: Any,
    edges: Any,
    ends: Any,
    categories: Any,
    slots: Any,
    item: Any,
    category: Any,
    position: Any,
    distinct: Any,
) -> bool:
    """Step s has rows edges[s]..edges[s+1]-1; its items stand at ends[s]..ends[s+1]-1 of item, category and position.

    slots: a hash table with open addressing; a slot names where its item stands. False where an item has no category.
    """
    for step in range(len(edges) - 1):
        first = ends[step]
        size = 16
        while size <= 2 * (ends[step + 1] - first):
            size *= 2
        slots[:size] = -1
        at, found = first, 0
        for row in range(edges[step], edges[step + 1]):
            address, start = addresses[place[row]], starts[row] + whole[row] - lengths[row]
            for j in range(lengths[row]):
                value = np.int64(element(address, start + j, like))
                if value < 0 or value >= len(categories):
                    return False
                slot = ((value * 0x9E3779B1) >> 15) & (size - 1)
                while slots[slot] >= 0 and item[first + slots[slot]] != value:
                    slot = (slot + 1) & (size - 1)
                if slots[slot] < 0:
                    slots[slot] = found
                    item[first + found] = value
                    category[first + found] = categories[value]
                    found += 1
                position[at] = slots[slot]
                at += 1
        distinct[step] = found
    return True
