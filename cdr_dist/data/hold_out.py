"""Which training behaviours are kept for the dev loss: functions of (seed, user or row, epoch), nothing is stored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cdr_dist.data.hashing import integers, key, mix, uniform
from cdr_dist.data.stored_rows import StoredRows


@dataclass(frozen=True)
class HoldOut:
    """Which training behaviours are kept for the dev loss for a period of epochs; nothing is stored.

    In every period a user has `share` of the training behaviours held out, drawn anew: lower updates have not been
    fitted on them lately, and none is lost for good. A fraction of a behaviour is the probability of one more, and one
    behaviour is always left.
    """

    seed: int
    share: float
    epochs: int

    def held(self, stored: StoredRows, epoch: int) -> NDArray[np.bool_]:
        """Which stored rows are held out in an epoch, [n]."""
        own = stored.lists("target_candidates_item").lengths
        return self.of(stored["user"], own, epoch).contains(stored["position"])

    def of(self, user: NDArray, behaviours: NDArray, epoch: int) -> HeldOut:
        """user, behaviours (the user's number of them): [n]."""
        period = epoch // self.epochs
        first = integers(mix(key("held_out", self.seed), user, period), np.maximum(behaviours, 1))
        more = uniform(mix(key("hold_out", self.seed), user, period))
        count = np.minimum((self.share * behaviours + more).astype(np.int64), behaviours - 1)
        return HeldOut(first, np.maximum(count, 0), np.maximum(behaviours, 1))


@dataclass(frozen=True)
class Split:
    """A share of the training behaviours that lower updates never see: the dev set of BIAO's `split r` (Table 3)."""

    seed: int
    share: float

    def held(self, stored: StoredRows, _epoch: int) -> NDArray[np.bool_]:
        """Which stored rows are of the dev set, [n]."""
        return uniform(mix(key("split", self.seed), stored["example_id"])) < self.share


@dataclass(frozen=True)
class HeldOut:
    """Of each of [n] users: `count` behaviours from `first` on, round a list of `behaviours`."""

    first: NDArray[np.int64]
    count: NDArray[np.int64]
    behaviours: NDArray[np.int64]

    def contains(self, position: NDArray[np.int64]) -> NDArray[np.bool_]:
        """position [n]; -1 is a behaviour that the list does not hold."""
        return (position >= 0) & ((position - self.first) % self.behaviours < self.count)

    def one(
        self, bits: NDArray[np.uint64], turn: NDArray[np.int64], after: NDArray[np.int64] | int = -1
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The position of one each of those behind the position `after`, [n], and whether there is one.

        Turns 0, 1, .. below their number give different ones.
        """
        end = self.first + self.count
        start = np.maximum(self.first, after + 1)  # round the list, they stand from `start` on and from after + 1 on
        here = np.maximum(np.minimum(end, self.behaviours) - start, 0)
        count = here + np.maximum(end - self.behaviours - (after + 1), 0)
        place = (integers(bits, np.maximum(count, 1)) + turn) % np.maximum(count, 1)
        return np.where(place < here, start + place, after + 1 + place - here), turn < count
