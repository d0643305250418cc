"""First of two stages: a few hundred items for a user out of millions, which the model then scores.

Three sources, each with a share of them:

- *embeddings*: the items with the largest approximate score, found by faiss. The approximation knows the backbone by
  its scores alone: an item's vector holds its scores with some landmark users, a user's query the coefficients that
  make the landmarks' scores with anchor items into the user's own (a CUR decomposition of the matrix of all scores, as
  in ANNCUR: Yadav et al., EMNLP 2022). So it serves every backbone, towers that cross included.
- *co-visitation*: what users of the same items, of either domain, also liked.
- *popularity*: what most liked.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdr_dist.data import hashing, storage
from cdr_dist.data.dataset import FIRST_ID, PADDING, USERS, Manifest
from cdr_dist.data.lists import Lists
from cdr_dist.data.stored_rows import StoredRows
from cdr_dist.models.pairs import PairScorer
from cdr_dist.training.full_ranking import item_parts, pair_scores
from cdr_dist.training.positives import finite

if TYPE_CHECKING:
    from cdr_dist.training.session import Session

Ints = NDArray[np.int64]

SHARES = {"embeddings": 0.5, "covisited": 0.25, "popular": 0.25}
"""Of the candidates; what the first two leave free, for want of items, popular ones fill."""
ANCHORS = 256
WIDTH = 48
"""Values of an item's vector in the index."""
EXACT_UP_TO = 50_000
"""Items up to which neighbours are found by looking at all."""
LOOKED_AT = 1 / 64
"""Of an index of more items, the share of its cells that a query looks at."""
COVISIT_USERS = 200_000
"""Users, a random sample, whose histories count for co-visitation."""
LATEST, NEIGHBOURS = 10, 20
"""Items of a user's history of each domain that count, and neighbours that an item keeps."""
HISTORIES = ("target_history_item", "source_history_item")


class Embeddings:
    """Items by approximate score. items [I]: ids; scores [L, I]: of some users with all of them; a collective call."""

    def __init__(self, session: Session, scorer: PairScorer, items: Ints, scores: Tensor) -> None:
        self._scorer, self._items = scorer, items
        anchors = _anchors(scores, session.config.seed)
        vectors = _compressed(torch.cat([scores, torch.ones(1, len(items))]).t())
        near = vectors[anchors]
        gram = near.t() @ near
        ridge = 1e-4 * gram.diagonal().mean().clamp(min=1e-12)
        self._solve = near @ torch.linalg.inv(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
        (self._anchors,) = item_parts(session, scorer, items[anchors.numpy()])
        self._index = _index(vectors.float().numpy(), session.config.seed)
        faiss.omp_set_num_threads(session.config.trainer.threads)

    def __call__(self, parts: Tensor, most: int) -> Ints:
        """Item ids [n, most] of users' row parts [n, p], best first; PADDING where there are fewer."""
        own = finite(pair_scores(self._scorer, parts, self._anchors)).cpu().double()
        query = np.pad((own @ self._solve).float().numpy(), ((0, 0), (0, 1)))
        _, found = self._index.search(query, min(most, len(self._items)))
        return np.where(found < 0, PADDING, self._items[found])


def _anchors(scores: Tensor, seed: int) -> Tensor:
    """Numbers of items whose scores tell a user's query: half of them where it matters, at the top."""
    items = scores.shape[1]
    if items <= ANCHORS:
        return torch.arange(items)
    highest = scores.mean(0).topk(ANCHORS // 2).indices
    drawn = torch.from_numpy(hashing.permutation(hashing.key(seed, "anchors"), items)[:ANCHORS])
    rest = drawn[~torch.isin(drawn, highest)][: ANCHORS - len(highest)]
    return torch.cat([highest, rest]).sort().values


def _compressed(vectors: Tensor) -> Tensor:
    """[I, L] -> [I, WIDTH] or fewer: along the directions in which they are longest."""
    _, directions = torch.linalg.eigh(vectors.t().double() @ vectors.double())
    return vectors.double() @ directions[:, -WIDTH:]


def _index(vectors: NDArray[np.float32], seed: int) -> Any:
    """Of vectors [I, k]; a query is [k + 1] with 0 at the end.

    One more value makes all vectors as long as the longest: then the largest products are the smallest distances
    (Bachrach et al., RecSys 2014), whose cells hold what belongs together; cells by product lose most of the best.
    """
    squares = (vectors**2).sum(1)
    filled = np.column_stack([vectors, np.sqrt(squares.max(initial=0.0) - squares)]).astype(np.float32)
    items, width = filled.shape
    if items <= EXACT_UP_TO:
        index: Any = faiss.IndexFlatL2(width)
    else:
        cells = int(2 * items**0.5)
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(width), width, cells, faiss.METRIC_L2)
        index.nprobe = max(1, int(cells * LOOKED_AT))
        index.cp.seed, index.cp.niter, index.cp.max_points_per_centroid = seed & 0x7FFFFFFF, 10, 64
        index.train(filled)
    index.add(filled)
    return index


class CoVisited:
    """item -> the NEIGHBOURS items of the target that its users also liked most, by the cosine of their users."""

    def __init__(self, folder: str, manifest: Manifest, allowed: NDArray[np.bool_]) -> None:
        """allowed [items]: of every target item id, whether it may be recommended."""
        self._offsets = {"target_history_item": 0, "source_history_item": manifest.rows["target_item"]}
        seen = self._histories(folder, manifest)
        users_of = seen.group_by("item").agg(users=pl.len())
        liked = seen.filter(pl.col("item") < manifest.rows["target_item"])
        liked = liked.filter(pl.Series(allowed).gather(liked["item"])).rename({"item": "other"})
        pairs = seen.join(liked, on="user").filter(pl.col("item") != pl.col("other"))
        counted = pairs.group_by("item", "other").agg(both=pl.len())
        for name in ("item", "other"):
            counted = counted.join(users_of.rename({"item": name, "users": f"{name}_users"}), on=name)
        cosine = pl.col("both") / (pl.col("item_users").cast(pl.Float64) * pl.col("other_users")).sqrt()
        scored = counted.select("item", "other", score=cosine).sort(
            "item", "score", "other", descending=[False, True, False]
        )
        kept = scored.group_by("item", maintain_order=True).head(NEIGHBOURS)
        self._item = kept["item"].to_numpy().astype(np.int64)
        self._other = kept["other"].to_numpy().astype(np.int64)
        self._score = kept["score"].to_numpy()

    def _histories(self, folder: str, manifest: Manifest) -> pl.DataFrame:
        """user, item: the latest of each history, items of the source behind those of the target."""
        parts, users = [], 0
        for shard in manifest.shards[USERS]:
            content = io.BytesIO(storage.read_bytes(storage.join(folder, shard.path)))
            rows = pl.read_parquet(content, columns=list(HISTORIES)).head(COVISIT_USERS - users)
            rows = rows.with_row_index("user", offset=users)
            for name, offset in self._offsets.items():
                one = rows.select("user", item=pl.col(name).list.tail(LATEST)).explode("item").drop_nulls()
                parts.append(
                    one.filter(pl.col("item") >= FIRST_ID).with_columns(pl.col("item").cast(pl.Int64) + offset)
                )
            users += rows.height
            if users == COVISIT_USERS:
                break
        return pl.concat(parts).unique(maintain_order=True)

    def __call__(self, stored: StoredRows, most: int) -> Ints:
        """Item ids [n, most] of users' rows, best first; PADDING where there are fewer."""
        user, item = _latest(stored, self._offsets)
        first, last = np.searchsorted(self._item, item), np.searchsorted(self._item, item, side="right")
        lengths = last - first
        place = np.repeat(first - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
        rows = pl.DataFrame({"user": np.repeat(user, lengths), "item": self._other[place], "score": self._score[place]})
        best = rows.group_by("user", "item").agg(pl.col("score").sum())
        best = best.sort("user", "score", "item", descending=[False, True, False])
        best = best.with_columns(place=pl.int_range(pl.len()).over("user")).filter(pl.col("place") < most)
        found = np.full((len(stored), most), PADDING, dtype=np.int64)
        found[best["user"].to_numpy(), best["place"].to_numpy()] = best["item"].to_numpy()
        return found


def _latest(stored: StoredRows, offsets: Mapping[str, int]) -> tuple[Ints, Ints]:
    """(user, item) of the latest items of every row's histories, each once."""
    users, items = [], []
    for name, offset in offsets.items():
        lists: Lists = stored.lists(name)
        flat, lengths = lists.of(np.arange(len(stored)))
        from_end = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(flat))
        kept = (from_end <= LATEST) & (flat >= FIRST_ID)
        users.append(np.repeat(np.arange(len(stored)), lengths)[kept])
        items.append(flat[kept].astype(np.int64) + offset)
    user, item = np.unique(np.stack([np.concatenate(users), np.concatenate(items)]), axis=1)
    return user, item


@dataclass
class Candidates:
    """All three. popular [P]: item ids, most popular first; most: candidates of a user."""

    embeddings: Embeddings
    covisited: CoVisited
    popular: Ints
    most: int

    def by_source(self, parts: Tensor, stored: StoredRows) -> dict[str, Ints]:
        """Source -> item ids [n, its share]; of users' row parts [n, p] and their rows."""
        shares = {name: max(1, int(self.most * share)) for name, share in SHARES.items()}
        return {
            "embeddings": self.embeddings(parts, shares["embeddings"]),
            "covisited": self.covisited(stored, shares["covisited"]),
            "popular": self._popular(len(stored), shares["popular"]),
        }

    def _popular(self, users: int, most: int) -> Ints:
        few = self.popular[:most]
        return np.broadcast_to(few, (users, len(few)))

    def __call__(self, parts: Tensor, stored: StoredRows) -> Ints:
        """Item ids [n, most], each once, PADDING behind the last: the sources' own share first, then what fills up."""
        rows, own = len(stored), self.by_source(parts, stored).values()
        item = np.concatenate([*own, self._popular(rows, self.most)], axis=1)
        order = np.argsort(item, axis=1, kind="stable")  # of equal ones the first stays
        ranked = np.take_along_axis(item, order, axis=1)
        again = np.zeros(item.shape, dtype=bool)
        np.put_along_axis(again, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
        kept = ~again & (item != PADDING)
        place = np.cumsum(kept, axis=1) - 1
        found = np.full((rows, self.most), PADDING, dtype=np.int64)
        row, column = np.nonzero(kept & (place < self.most))
        found[row, place[row, column]] = item[row, column]
        return found
