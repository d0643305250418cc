"""Top-N for every user of a dataset, over all workers, into Parquet.

OUT/part-00000.parquet …     SCHEMA; a part for each lane, whose rows no number of workers changes
OUT/recommendations.json     what was asked and found; written last
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdr_dist.crash_points import durable
from cdr_dist.data import storage
from cdr_dist.data.dataset import FIRST_ID, PADDING, USERS
from cdr_dist.data.feature_names import is_shared, of_history, vocabulary_of
from cdr_dist.data.item_columns import item_categories
from cdr_dist.data.keys import Keys
from cdr_dist.data.lanes import lanes_of
from cdr_dist.data.stored_rows import StoredRows
from cdr_dist.embeddings.features import ids_by_table, rows_by_feature
from cdr_dist.embeddings.workers import max_over_workers, sum_over_workers
from cdr_dist.errors import UserError
from cdr_dist.models.pairs import pair_scorer
from cdr_dist.production.candidates import HISTORIES, Candidates, CoVisited, Embeddings
from cdr_dist.production.recommendation_options import RecommendOptions
from cdr_dist.production.top import Top
from cdr_dist.production.trained import Trained
from cdr_dist.training.evaluate import evaluation_rows, one_ahead
from cdr_dist.training.full_ranking import COLUMNS, LOOKED_UP, PAIRS, item_parts, pair_scores
from cdr_dist.training.positives import finite

if TYPE_CHECKING:
    from cdr_dist.training.session import Session

Ints = NDArray[np.int64]

SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("by", pa.string()),  # model; or popularity, for whom the model knows nothing of
        ("item_id", pa.list_(pa.string())),  # best first
        ("score", pa.list_(pa.float32())),  # the model's probability of a like; or the item's likes in training
    ]
)
HELD_USERS = 1 << 14
"""Users of a worker whose items are chosen at a time: items are looked up once for all of these."""
LANDMARKS = 96
"""Users that tell which items score high in general, about."""


@dataclass
class Step:
    """n users of one lane: their rows, their parts of the scores [n, p], and which of them the model knows [n].

    row, item: pairs that must not be recommended, [m] each.
    """

    lane: int
    stored: StoredRows
    part: Tensor
    known: NDArray[np.bool_]
    row: Ints
    item: Ints

    def __len__(self) -> int:
        return len(self.stored)

    @cached_property
    def rows_known(self) -> Tensor:
        return torch.from_numpy(np.flatnonzero(self.known))

    @cached_property
    def rows_unknown(self) -> Tensor:
        return torch.from_numpy(np.flatnonzero(~self.known))

    @cached_property
    def part_known(self) -> Tensor:
        return self.part[self.rows_known.to(self.part.device)]

    def known_ones(self, start: int, stop: int) -> Step:
        """Some of the users whom the model knows."""
        rows = np.flatnonzero(self.known)[start:stop]
        place = np.full(len(self), -1)
        place[rows] = np.arange(len(rows))
        row = place[self.row]
        part = self.part[torch.from_numpy(rows).to(self.part.device)]
        return Step(self.lane, self.stored.arranged(rows), part, self.known[rows], row[row >= 0], self.item[row >= 0])


class Recommender:
    """Built once on every worker; all its methods are collective calls.

    users: keys of those who are asked for, None for all; items [items]: of every target item id, whether it may be
    recommended.
    """

    @torch.no_grad()
    def __init__(
        self,
        session: Session,
        options: RecommendOptions,
        trained: Trained,
        items: NDArray[np.bool_],
        users: pa.Array | None = None,
    ) -> None:
        self._session, self._options, self._trained, self._asked = session, options, trained, users
        features = [f for f in session.model.spec().features if not is_shared(f)]  # not those of pre-training
        self._reads_user = any(vocabulary_of(f) == "user" for f in features)
        self._reads_source = any(f.startswith("source_") and not of_history(f) for f in features)
        self._reads = [n for n in HISTORIES if any(f.startswith(n.removesuffix("item")) for f in features)]
        self._lanes = list(lanes_of(session.rank, session.workers, session.config.stream.lanes))
        self._category = item_categories(session.folder, session.manifest, "target") if options.per_category else None
        session.model.eval()
        self._scorer = pair_scorer(session.model)
        allowed = np.flatnonzero(items)
        self.items: Ints = allowed[allowed >= FIRST_ID]
        if not len(self.items):
            raise UserError("no item may be recommended: none has a training row; see new_items=")
        likes = trained.likes[self.items]
        self._popular = self.items[np.lexsort((self.items, -likes))]
        scores = self._scores_of_landmarks()
        # Items that score high in general come first: so most of the others are soon seen to be too low.
        self._by_score = self.items[np.argsort(-scores.sum(0).numpy(), kind="stable")]
        most = options.candidates_of(len(self.items))
        self.candidates: Candidates | None = None
        if most and len(scores):
            covisited = CoVisited(session.folder, session.manifest, items)
            embeddings = Embeddings(session, self._scorer, self.items, scores)
            self.candidates = Candidates(embeddings, covisited, self._popular, most)

    @torch.no_grad()
    def write(self, out: str) -> dict[str, Any]:
        """Writes this worker's parts -> what all of them hold."""
        session = self._session
        keys = Keys(session.folder, session.manifest, "target_item")
        counts = torch.zeros(3, dtype=torch.float64)  # by model, by popularity, with fewer than top
        rows = torch.zeros(session.config.stream.lanes, dtype=torch.float64)
        covered = torch.zeros(len(self._trained.likes), dtype=torch.float64)
        with contextlib.ExitStack() as ending:
            writers = {lane: ending.enter_context(_part(out, lane)) for lane in self._lanes}
            for held in self._held():
                for step, top in zip(held, self._chosen(held), strict=True):
                    if not len(step):
                        continue
                    table = self._table(step, top, keys)
                    writers[step.lane].write_table(table)
                    rows[step.lane] += len(step)
                    bounds, item, _ = top.of_users()
                    covered[item] = 1.0
                    short = int((np.diff(bounds) < self._options.top).sum())
                    counts += torch.tensor([step.known.sum(), (~step.known).sum(), short], dtype=torch.float64)
        rows, counts, covered = (sum_over_workers(x) for x in (rows, counts, covered))
        return {
            "users": int(rows.sum()),
            "by": {"model": int(counts[0]), "popularity": int(counts[1])},
            "users_with_fewer": int(counts[2]),
            "items": len(self.items),
            "coverage": round(float((covered > 0).sum()) / len(self.items), 6),
            "parts": [{"path": path_of(lane), "rows": int(n)} for lane, n in enumerate(rows.tolist())],
        }

    @torch.no_grad()
    def recall(self) -> dict[str, Any]:
        """How many of a sample's best items among all are candidates, and of which source; needs `candidates`."""
        assert self.candidates is not None
        each = math.ceil(self._options.recall_users / self._session.config.stream.lanes)
        first = math.ceil(LANDMARKS / self._session.config.stream.lanes)  # the landmarks' own recall is no measure
        sample = [step.known_ones(first, first + each) for step in self._first_steps()]
        exact = self._of_all(sample)
        found = torch.zeros(5, dtype=torch.float64)
        for step, top in zip(sample, exact, strict=True):
            if not len(step):
                continue
            by_source = self.candidates.by_source(step.part, step.stored)
            every = {"all": self.candidates(step.part, step.stored)} | by_source
            _, item, _ = top.of_users()
            best = top.user * len(self._trained.likes) + item
            for number, candidates in enumerate(every.values()):
                pairs = np.arange(len(step))[:, None] * len(self._trained.likes) + candidates
                found[number] += int(np.isin(best, pairs).sum())
            found[4] += len(best)
        found = sum_over_workers(found)
        users = sum_over_workers(torch.tensor(float(sum(map(len, sample)))))
        total = max(1.0, float(found[4]))
        names = ("recall", "embeddings", "covisited", "popular")
        return {"users": int(users)} | {name: round(float(found[i]) / total, 4) for i, name in enumerate(names)}

    def _held(self) -> Iterator[list[Step]]:
        """All users, some steps at a time: as many on every worker."""
        steps = one_ahead(self._rows())
        size = self._session.config.evaluation.batch_size
        while held := [self._step(*one) for one in itertools.islice(steps, max(1, HELD_USERS // size))]:
            yield held

    def _rows(self) -> Iterator[tuple[int, StoredRows]]:
        lanes = itertools.cycle([*self._lanes, *[-1] * (self._session.lanes_at_most - len(self._lanes))])
        more = ["user_id", "seen_item", *HISTORIES]
        for lane, rows in zip(lanes, evaluation_rows(self._session, USERS, more=more), strict=False):
            yield lane, self._asked_for(rows.stored)

    def _asked_for(self, stored: StoredRows) -> StoredRows:
        if self._asked is None or not len(stored):
            return stored
        return stored.arranged(np.flatnonzero(pc.is_in(stored.texts("user_id"), self._asked).to_numpy(False)))

    def _first_steps(self) -> list[Step]:
        """The first step of each lane of this worker."""
        rows = self._rows()
        found = [self._step(*one) for one in itertools.islice(rows, self._session.lanes_at_most)]
        rows.close()  # type: ignore[attr-defined]
        return found

    def _step(self, lane: int, stored: StoredRows) -> Step:
        session = self._session
        batch = session.builder.users(stored, max(1, len(stored))).to(session.device)
        looked_up = session.tables.read(ids_by_table(batch.train, session.features))
        part = self._scorer.row_part(rows_by_feature(looked_up, batch.train, session.features), batch)
        row = item = np.zeros(0, dtype=np.int64)
        if self._options.seen == "drop":
            seen, lengths = stored.lists("seen_item").of(np.arange(len(stored)))
            row, item = np.repeat(np.arange(len(stored)), lengths), seen.astype(np.int64)
        return Step(lane, stored, part[: len(stored)], self._known(stored), row, item)

    def _known(self, stored: StoredRows) -> NDArray[np.bool_]:
        """Whether the model knows anything of a user: by the user's own row, or by a behaviour that it reads."""
        known = self._trained.users[stored["user"]] & self._reads_user
        lists = [*self._reads, *(["source_candidates_item"] if self._reads_source else [])]
        for name in lists:
            flat, lengths = stored.lists(name).of(np.arange(len(stored)))
            of_row = np.repeat(np.arange(len(stored)), lengths)
            known |= np.bincount(of_row, weights=flat >= FIRST_ID, minlength=len(stored)) > 0
        return known

    def _scores_of_landmarks(self) -> Tensor:
        """Of known users with all items, [L, I], the same on every worker and on any number of them."""
        session, lanes = self._session, self._session.config.stream.lanes
        each = math.ceil(LANDMARKS / lanes)
        steps = self._first_steps()
        parts = torch.zeros(lanes, each, 1 + steps[0].part.shape[1], device=session.device)
        for step in steps:
            some = step.part_known[:each] if step.lane >= 0 else step.part[:0]
            if len(some):
                parts[step.lane, : len(some), 0], parts[step.lane, : len(some), 1:] = 1.0, some
        flat = sum_over_workers(parts).flatten(0, 1)
        landmarks = flat[flat[:, 0] > 0][:, 1:]
        of_items = item_parts(session, self._scorer, self.items)
        return torch.cat([finite(pair_scores(self._scorer, landmarks, part)) for part in of_items], dim=1).cpu()

    def _chosen(self, held: Sequence[Step]) -> list[Top]:
        found = self._of_all(held) if self.candidates is None else self._of_candidates(held)
        for step, top in zip(held, found, strict=True):
            self._fall_back(step, top)
        return found

    def _tops(self, held: Sequence[Step]) -> list[Top]:
        return [Top(len(step), self._options.top, self._options.per_category, self._category) for step in held]

    def _of_all(self, held: Sequence[Step]) -> list[Top]:
        order, found = self._by_score, self._tops(held)
        place = np.full(len(self._trained.likes), -1)
        place[order] = np.arange(len(order))
        barred = [_by_column(place[step.item], _among(step.known, step.row)) for step in held]
        first = 0
        for part in item_parts(self._session, self._scorer, order):
            for items in part.split(COLUMNS):
                ids = order[first : first + len(items)]
                for step, top, (column, row) in zip(held, found, barred, strict=True):
                    if len(step.rows_known):
                        scores = finite(pair_scores(self._scorer, step.part_known, items))
                        a, b = np.searchsorted(column, [first, first + len(items)])
                        scores[torch.from_numpy(row[a:b]), torch.from_numpy(column[a:b] - first)] = -torch.inf
                        top.offer(step.rows_known, ids, scores)
                first += len(items)
        return found

    def _of_candidates(self, held: Sequence[Step]) -> list[Top]:
        assert self.candidates is not None
        wanted = []
        for step in held:
            rows = step.stored.arranged(np.flatnonzero(step.known))
            some = self.candidates(step.part_known, rows) if len(rows) else np.zeros((0, 1), dtype=np.int64)
            barred = step.row * len(self._trained.likes) + step.item
            own = step.rows_known.numpy()[:, None] * len(self._trained.likes) + some
            wanted.append(np.where(np.isin(own, barred), PADDING, some))
        found = self._tops(held)
        for step, top, some in zip(held, found, wanted, strict=True):
            ids = np.unique(some)  # of this step alone: the bits of a product depend on its shape
            parts = self._parts_of(ids)
            scores = torch.empty(some.shape)
            place = torch.from_numpy(np.searchsorted(ids, some)).to(parts.device)
            for a in range(0, len(some), rows := max(1, PAIRS // max(1, some.shape[1]))):
                users = step.part_known[a : a + rows, None]
                scores[a : a + rows] = finite(self._scorer.logits(users, parts[place[a : a + rows]]))
            scores[torch.from_numpy(some == PADDING)] = -torch.inf
            top.offer(step.rows_known, some, scores)
        return found

    def _parts_of(self, ids: Ints) -> Tensor:
        """[n, q] of item ids, which differ between workers."""
        calls = int(max_over_workers(torch.tensor(float(math.ceil(len(ids) / LOOKED_UP)))))
        found = []
        for call in range(max(1, calls)):
            some = ids[call * LOOKED_UP : (call + 1) * LOOKED_UP]
            (part,) = item_parts(self._session, self._scorer, some if len(some) else np.array([PADDING]))
            found.append(part[: len(some)])
        return torch.cat(found)

    def _fall_back(self, step: Step, top: Top) -> None:
        """Popular items for users of whom the model knows nothing."""
        rows = step.rows_unknown
        if not len(rows):
            return
        barred = step.row * len(self._trained.likes) + step.item
        size = 4 * self._options.top
        for first in range(0, len(self._popular), size):
            ids = self._popular[first : first + size]
            scores = torch.from_numpy(self._trained.likes[ids]).float().repeat(len(rows), 1)
            pairs = rows.numpy()[:, None] * len(self._trained.likes) + ids
            scores[torch.from_numpy(np.isin(pairs, barred))] = -torch.inf
            top.offer(rows, ids, scores)
            if top.full(rows):  # and what follows is less popular
                break

    def _table(self, step: Step, top: Top, keys: Keys) -> pa.Table:
        bounds, item, score = top.of_users()
        known = step.known[top.user]
        probability = 1.0 / (1.0 + np.exp(-score.astype(np.float64)))
        offsets = pa.array(bounds.astype(np.int32))
        columns = [
            step.stored.texts("user_id"),
            pa.array(np.where(step.known, "model", "popularity")),
            pa.ListArray.from_arrays(offsets, keys.of(item)),
            pa.ListArray.from_arrays(offsets, pa.array(np.where(known, probability, score).astype(np.float32))),
        ]
        return pa.table(columns, schema=SCHEMA)


def path_of(lane: int) -> str:
    return f"part-{lane:05d}.parquet"


@contextlib.contextmanager
def _part(out: str, lane: int) -> Iterator[pq.ParquetWriter]:
    """A part that appears when it is whole."""
    with (
        durable("recommend.part"),
        storage.open_output(storage.join(out, path_of(lane))) as file,
        pq.ParquetWriter(file, SCHEMA, compression="zstd", write_page_checksum=True) as writer,
    ):
        yield writer


def _among(known: NDArray[np.bool_], row: Ints) -> Ints:
    """Numbers of rows among those that are known; -1 of the others."""
    return np.where(known, np.cumsum(known) - 1, -1)[row] if len(row) else row


def _by_column(column: Ints, row: Ints) -> tuple[Ints, Ints]:
    """Pairs of known rows and items that may be recommended, by column."""
    kept = np.flatnonzero((row >= 0) & (column >= 0))
    order = kept[np.argsort(column[kept], kind="stable")]
    return column[order], row[order]
