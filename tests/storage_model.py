"""What stream and checkpoint must do, said again as simply as possible: the reference of tests/test_histories.py.

No code is shared with the project but the hash that permutations come from.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cdr_dist.data.hashing import key, permutation

ROWS = 12
"""Of the one table."""


@dataclass(frozen=True)
class Shape:
    """A tiny dataset and the options of its stream."""

    groups: tuple[int, ...] = (5, 3, 7, 4)
    lanes: int = 3
    window: int = 2
    rows_per_step: int = 4
    seed: int = 8

    def steps(self, epoch):
        """Example ids of every global step of an epoch; an id is the example's place in stored order."""
        starts = [sum(self.groups[:g]) for g in range(len(self.groups))]
        rows = [
            (g, starts[g] + i)
            for g in permutation(key("groups", self.seed, "lower", epoch), len(self.groups)).tolist()
            for i in range(self.groups[g])
        ]
        lanes, end = [], 0
        for lane in range(self.lanes):
            start, end = end, end + len(rows) // self.lanes + (lane < len(rows) % self.lanes)
            lanes.append(self._shuffled(epoch, lane, rows[start:end]))
        order = [lanes[p % self.lanes][p // self.lanes] for p in range(len(rows))]
        return [order[i : i + self.rows_per_step] for i in range(0, len(rows), self.rows_per_step)]

    def _shuffled(self, epoch, lane, rows):
        pieces = []
        for group, row in rows:
            if not pieces or pieces[-1][0] != group:
                pieces.append((group, []))
            pieces[-1][1].append(row)
        out = []
        for number, first in enumerate(range(0, len(pieces), self.window)):
            inside = [row for _, piece in pieces[first : first + self.window] for row in piece]
            order = permutation(key("window", self.seed, "lower", epoch, lane, number), len(inside))
            out += [inside[i] for i in order.tolist()]
        return out


@dataclass
class State:
    """The trained state after a number of steps; what was trained twice, left out or swapped shows in it."""

    weights: list[int] = field(default_factory=lambda: list(range(ROWS)))
    updates: list[int] = field(default_factory=lambda: [0] * ROWS)
    dense: int = 1

    def step(self, ids):
        for row in range(ROWS):
            added = sum(i + 1 for i in ids if i % ROWS == row)
            if added:
                self.weights[row] = (3 * self.weights[row] + added) % 65521
                self.updates[row] += 1
        self.dense = (5 * self.dense + sum(ids)) % 65521


def states(shape, steps):
    """The state after 0, 1, … steps."""
    found, state, epoch = [State()], State(), 0
    while len(found) <= steps:
        for ids in shape.steps(epoch):
            state.step(ids)
            found.append(State(list(state.weights), list(state.updates), state.dense))
        epoch += 1
    return found


@dataclass
class Kept:
    """Which checkpoints must be there: step -> the best step that it knew. `perhaps`: not yet dropped by a crash."""

    keep: int
    complete: dict[int, int] = field(default_factory=dict)
    perhaps: set[int] = field(default_factory=set)

    def save(self, step, best, crashed=False):
        before = set(self.complete)
        self.complete[step] = best
        newest = sorted(self.complete)[-self.keep :]
        self.complete = {s: b for s, b in sorted(self.complete.items()) if s in newest or s == best}
        gone = before - set(self.complete)
        self.perhaps = self.perhaps | gone if crashed else set()

    def seen(self, there):
        """After a crash: those that it had not dropped yet are as good as any."""
        self.complete |= {step: -1 for step in self.perhaps & set(there)}
        self.perhaps = set()

    def newest(self):
        return max(self.complete, default=0)

    def lose_newest(self):
        self.complete.pop(self.newest())
