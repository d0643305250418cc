"""What the perceptron says of stored source behaviours (Figure 6 of BIAO): both parts, score, relative weight.

A user's source behaviours are its candidates (`source_candidates_*`), which are the same in all of its rows. Each of
them is scored once, next to the histories of the user's last training row. That is the row whose behaviour is the last
of `target_candidates`, so a row shows by itself whether it is one, and users need not be remembered: memory is that of
a step, whatever the number of users.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdr_dist.bilevel.perceptron import HISTORIES, PerceptronInput
from cdr_dist.bilevel.relative_weights import LogMeanMass
from cdr_dist.data.histories import History
from cdr_dist.data.lanes import Piece, lanes_of
from cdr_dist.data.options import StreamOptions
from cdr_dist.data.shards import ShardReader
from cdr_dist.data.stored_rows import StoredRows
from cdr_dist.data.stream import Stream
from cdr_dist.errors import UserError
from cdr_dist.evaluation.metrics import all_gather_rows
from cdr_dist.training.evaluate import lane_by_lane

if TYPE_CHECKING:
    from cdr_dist.training.session import Session

ROWS = 250
"""Stored rows of a lane and step: with 100 candidates each, 25,000 behaviours are scored at a time."""

_CANDIDATES = ("source_candidates_item", "source_candidates_label", "source_candidates_timestamp")
COLUMNS = ("user", "position", "target_candidates_item", *_CANDIDATES, *(f"{d}_history_item" for d in HISTORIES))


@dataclass(frozen=True)
class Behaviours:
    """n source behaviours; user, item, category (vocabulary ids), timestamp: int64 [n]; the rest float32 [n].

    global_part, local_part: gamma_1 (eq. 3) and gamma_2 (eq. 4-7), 1 where a run leaves it out; score: their product.
    """

    user: Tensor
    item: Tensor
    category: Tensor
    timestamp: Tensor
    label: Tensor
    global_part: Tensor
    local_part: Tensor
    score: Tensor

    def __len__(self) -> int:
        return len(self.user)

    @classmethod
    def joined(cls, parts: Sequence[Behaviours]) -> Behaviours:
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def of_all_workers(self) -> Behaviours:
        """In rank order, on the CPU. A collective call."""
        columns = [of if of.dtype == torch.int64 else of.double().view(torch.int64) for of in vars(self).values()]
        whole = all_gather_rows(torch.stack(columns, dim=1)).cpu()
        kinds = [of.dtype for of in vars(self).values()]
        return Behaviours(
            *(
                column.contiguous() if kind == torch.int64 else column.contiguous().view(torch.float64).to(kind)
                for column, kind in zip(whole.unbind(1), kinds, strict=True)
            )
        )


class Scorer:
    """The session's perceptron over stored rows."""

    def __init__(self, session: Session) -> None:
        self._session = session
        f = session.features
        self._tables = {d: (f[f"{d}_item"], f[f"{d}_category"]) for d in HISTORIES}

    @torch.no_grad()
    def __call__(self, stored: StoredRows) -> Behaviours:
        """All candidates of the rows, row after row. A collective call, also without rows: it looks rows of tables up.

        Rows with about as many candidates are scored together: those of a row then share their histories, and few
        candidates are filled up.
        """
        session = self._session
        order, sizes = _alike(stored.lists(_CANDIDATES[0]).lengths)
        stored = stored.arranged(order)
        longest = int(stored.lists(_CANDIDATES[0]).lengths.max(initial=1))
        candidates = self._of(stored, "source_candidates", sizes, longest)
        of_last = session.config.batch.history_length
        histories = {d: self._of(stored, f"{d}_history", sizes, of_last) for d in HISTORIES}
        wanted = [("source", of) for of in candidates] + [(d, of) for d in HISTORIES for of in histories[d]]
        rows = session.tables.read_joined(
            [[*zip(self._tables[d], (of.item, of.category), strict=True)] for d, of in wanted]
        )
        each = len(sizes)
        parts = [
            self._parts(
                candidates[i],
                rows[i],
                {d: (histories[d][i], rows[(1 + n) * each + i]) for n, d in enumerate(HISTORIES)},
            )
            for i in range(each)
        ]
        global_part, local_part = (torch.cat(of) for of in zip(*parts, strict=True))
        item, lengths = stored.lists(_CANDIDATES[0]).of(np.arange(len(stored)))
        label, timestamp = (stored.lists(name).of(np.arange(len(stored)))[0] for name in _CANDIDATES[1:])
        back = np.argsort(np.repeat(order, lengths), kind="stable")

        def column(values: NDArray, kind: torch.dtype = torch.int64) -> Tensor:
            return torch.from_numpy(values[back]).to(session.device, kind)

        in_order = torch.from_numpy(back).to(session.device)
        return Behaviours(
            user=column(np.repeat(stored["user"], lengths)),
            item=column(item),
            category=column(session.builder.category_of["source"][item]),
            timestamp=column(timestamp),
            label=column(label, torch.float32),
            global_part=global_part[in_order],
            local_part=local_part[in_order],
            score=(global_part * local_part)[in_order],
        )

    def _of(self, stored: StoredRows, name: str, sizes: Sequence[int], last: int) -> list[History]:
        domain = name.partition("_")[0]
        lists = stored.lists(f"{name}_item")
        return [
            h.to(self._session.device)
            for h in History.of_steps(lists, sizes, last, self._session.builder.category_of[domain])
        ]

    def _parts(
        self, candidates: History, item: Tensor, histories: dict[str, tuple[History, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """(gamma_1, gamma_2) of rows' candidates, each [total]; item: vectors of the distinct ones."""
        perceptron = self._session.perceptron
        assert perceptron is not None
        if not len(candidates.position):
            return item.new_zeros(0), item.new_zeros(0)
        place, real = candidates.padded()
        seen = PerceptronInput(
            item=item.index_select(0, place.flatten()),
            history={d: vectors for d, (_, vectors) in histories.items()},
            position={d: of.position for d, (of, _) in histories.items()},
            lengths={d: of.lengths for d, (of, _) in histories.items()},
        )
        global_part, local_part = perceptron.parts(seen)
        return global_part.view_as(real)[real], local_part.view_as(real)[real]


def _alike(lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[int]]:
    """An order of lists in which those of similar length (by powers of two) are together, and how many of each."""
    if not len(lengths):
        return np.zeros(0, dtype=np.int64), [0]
    kind = np.ceil(np.log2(np.maximum(lengths, 1)))
    return np.argsort(kind, kind="stable"), np.unique(kind, return_counts=True)[1].tolist()


def last_rows(stored: StoredRows) -> StoredRows:
    """Of training rows those that are the last one of their user."""
    position = stored["position"]
    last = stored.lists("target_candidates_item").lengths - 1
    return stored.arranged(np.flatnonzero((position == last) & (position >= 0)))


def everyones(session: Session, most: int = 0) -> Iterator[Behaviours]:
    """Each behaviour of each user once, step by step, all of them on every worker. A collective call.

    The order is a function of the seed and of stream.lanes, not of the number of workers, and neither is a bit of what
    is found: a lane's rows meet the same rows on any number of workers.

    most: training rows to look at, 0 for all of them. The order of rows is a random one, in which the first of them are
    a sample of the users, each with all of its behaviours.
    """
    lanes = session.config.stream.lanes
    rows = min(lanes * ROWS, most or lanes * ROWS)
    reader = ShardReader(session.folder, session.manifest, "train", COLUMNS, replicas=session.replicas)
    options = StreamOptions(lanes, window=1)  # the fewest row groups in memory
    streams = [
        Stream(reader, rows, options, session.config.seed, "explain", lane, lanes)
        for lane in lanes_of(session.rank, session.workers, lanes)
    ]
    steps = streams[0].steps_per_epoch
    if most:
        steps = min(steps, max(1, most // rows))
    score = Scorer(session)
    found = lane_by_lane(streams, session.lanes_at_most, steps)
    for lane_rows in zip(*[found] * session.lanes_at_most, strict=True):
        behaviours = Behaviours.joined([score(last_rows(rows.stored)) for rows in lane_rows]).of_all_workers()
        yield finite(behaviours)


def typical(session: Session, most: int = 0) -> LogMeanMass:
    """What weights are relative to: the behaviours of the dataset, or of `most` training rows. A collective call."""
    assert session.perceptron is not None
    found = LogMeanMass(session.perceptron.options.normalisation)
    for behaviours in everyones(session, most):
        found.add(behaviours.score)
    if not found.behaviours:
        rows = f"the first {most:,} training rows" if most else "the dataset"
        raise UserError(f"{session.folder}: no user's source behaviour in {rows}; nothing to explain")
    return found


def finite(behaviours: Behaviours) -> Behaviours:
    if not torch.isfinite(behaviours.score).all():
        raise UserError("scores are not finite: the perceptron has diverged")
    return behaviours


def last_row_of(session: Session, user: int) -> StoredRows | None:
    """The last training row of a user id; None where it has none. All `user` columns are read, rows of one group."""
    found: tuple[int, int, int] | None = None
    reader = ShardReader(
        session.folder, session.manifest, "train", ["user", "position"], keep=1, replicas=session.replicas
    )
    for group, rows in enumerate(reader.row_groups):
        stored = StoredRows.of(reader.read(Piece(group, 0, rows)))
        own = np.flatnonzero(stored["user"] == user)
        if len(own):
            latest = own[stored["position"][own].argmax()]
            found = max(found or (-1, 0, 0), (int(stored["position"][latest]), group, int(latest)))
    if found is None:
        return None
    _, group, row = found
    whole = ShardReader(session.folder, session.manifest, "train", COLUMNS, keep=1, replicas=session.replicas)
    return StoredRows.of(whole.read(Piece(group, row, row + 1)))
