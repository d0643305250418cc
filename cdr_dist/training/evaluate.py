"""Scores of a split over all workers, and their metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cdr_dist.crash_points import durable
from cdr_dist.data import storage
from cdr_dist.data.stream import Place, Rows, Stream
from cdr_dist.embeddings.features import ids_by_table, rows_by_feature
from cdr_dist.errors import UserError
from cdr_dist.evaluation.metrics import Predictions, ScoredRows

if TYPE_CHECKING:
    from cdr_dist.training.session import Session

T = TypeVar("T")


@torch.no_grad()
def score_split(session: Session, split: str) -> ScoredRows:
    """Every row of a split with its stored negatives, scored by the current parameters; equal on all workers.

    Lane by lane, so that a row meets the same rows in its batch on any number of workers: a matrix product's bits
    depend on its shape.
    """
    session.model.eval()
    predictions = Predictions()
    built = (session.builder.evaluate(r.stored, r.global_rows) for r in evaluation_rows(session, split))
    for ready in one_ahead(built):
        batch = ready.to(session.device)
        found = session.tables.read(ids_by_table(batch.train, session.features))
        output = session.model(rows_by_feature(found, batch.train, session.features), batch)
        predictions.append(batch.user, batch.label, output.target_logit, batch.weight, batch.example)
    session.model.train()
    return predictions.gather()


def evaluation_rows(session: Session, split: str, more: Sequence[str] = ()) -> Iterator[Rows]:
    """Equally many on all workers: one that serves a lane less gets empty ones, because lookups are collective."""
    streams = session.evaluation_streams(split, more)
    yield from lane_by_lane(streams, session.lanes_at_most, streams[0].steps_per_epoch)


def lane_by_lane(streams: Sequence[Stream], most: int, steps: int) -> Iterator[Rows]:
    """The first steps of one stream a lane: of each step `most` rows, empty ones behind the last lane's."""
    with contextlib.ExitStack() as ending:
        for stream in streams:
            ending.callback(stream.close)
            stream.begin(Place())
        for step in range(steps):
            for i in range(most):
                rows = streams[min(i, len(streams) - 1)].read(Place(0, step))
                yield rows if i < len(streams) else replace(rows, stored=rows.stored.cut([0])[0])


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, of which a thread makes the next while one is used."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="cdr-evaluate") as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item  # type: ignore[misc]


def evaluate(session: Session, split: str, scores: str | None = None) -> dict[str, float]:
    """The metrics of a split; HR@K and NDCG@K for evaluation.ks where negatives are stored.

    `scores`: worker 0 writes every row there (Parquet: user, example, label, score).
    """
    rows = score_split(session, split)
    if scores is not None and session.rank == 0:
        columns = {"user": rows.user, "example": rows.group, "label": rows.label, "score": rows.score}
        with durable("run.scores"), storage.open_output(scores) as out:
            pq.write_table(pa.table(columns), out)
    try:
        return rows.compute(ks=tuple(session.config.evaluation.ks))
    except ValueError as error:
        raise UserError(f"{split}: {error}") from error
