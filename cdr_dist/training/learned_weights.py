"""What the perceptron found: the weights of a training epoch's source behaviours, by category, planted kind and
length of histories, and how they spread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from cdr_dist.bilevel.lookup import perceptron_input
from cdr_dist.crash_points import durable
from cdr_dist.data import storage
from cdr_dist.data.stored_rows import StoredRows
from cdr_dist.data.stream import Place
from cdr_dist.data.truth import of_categories, usefulness_by_category
from cdr_dist.embeddings.features import ids_by_table, rows_by_feature
from cdr_dist.embeddings.workers import world_size
from cdr_dist.evaluation.metrics import auc
from cdr_dist.training.run_folder import BY_LENGTH, HISTOGRAM, WEIGHTS, RunFolder

if TYPE_CHECKING:
    from cdr_dist.training.session import Session

MOST_STEPS = 200
BINS_AN_OCTAVE = 32
"""Of the histogram of weights: 2% each. Fixed, so that counts of any number of workers can be added."""


@dataclass(frozen=True)
class LearnedWeights:
    """What the weights w_j x B of source behaviours are (joint training's is gamma0), over all workers.

    by_category: category (id), behaviours, weight (mean), score (mean). histogram: lower, upper, behaviours; bins of a
    fixed logarithmic grid that hold any, [lower, upper); a weight of 0 has the bin [0, 0]. by_length: difference,
    behaviours, weight (mean), weight_squared (mean of squares); difference is the length of the source history minus
    that of the target history, as stored with the training example, before batch.history_length cuts them.
    """

    by_category: pl.DataFrame
    histogram: pl.DataFrame
    by_length: pl.DataFrame

    def write(self, place: RunFolder) -> None:
        files = {WEIGHTS: self.by_category, HISTOGRAM: self.histogram, BY_LENGTH: self.by_length}
        for name, frame in files.items():
            with durable("run.weights"), storage.open_output(place.file(name)) as out:
                pq.write_table(frame.to_arrow(), out)


@torch.no_grad()
def learned_weights(session: Session) -> LearnedWeights:
    """Of the behaviours (label 1 where labels are sampled) of at most 200 steps of the first epoch.

    Worker 0's is whole. A collective call.
    """
    perceptron = session.perceptron
    assert perceptron is not None
    feed = session.training_feed("lower", session.config.batch.size)
    feed.seek(Place())
    seen = []
    for _ in range(min(MOST_STEPS, feed.steps_per_epoch)):
        fed = feed.next()
        batch = fed.batch
        rows = session.tables.read(ids_by_table(batch.train, session.features))
        embedded = rows_by_feature(rows, batch.train, session.features)
        given = perceptron_input(session.tables, session.features, batch.histories, embedded, False)
        score = perceptron(given)
        weight = perceptron.weights(score, batch.source_valid, batch.global_rows) * batch.global_rows
        kept = batch.source_valid & ((batch.source_label > 0) | (session.manifest.label == "rating"))
        category = batch.train["source_category"].values()
        columns = (category, _difference(fed.stored, len(batch)).to(category.device), weight, score)
        seen.append(torch.stack([column[kept].double() for column in columns]))
    feed.close()
    values = torch.cat(seen, dim=1).cpu().numpy()
    frame = pl.DataFrame(dict(zip(("category", "difference", "weight", "score"), values, strict=True)))
    frame = frame.with_columns(pl.col("category", "difference").cast(pl.Int64))
    return LearnedWeights(
        by_category=_means(frame, "category", "weight", "score"),
        histogram=_histogram(frame["weight"]),
        by_length=_means(frame.with_columns(weight_squared=pl.col("weight") ** 2), "difference", *_MOMENTS),
    )


_MOMENTS = ("weight", "weight_squared")


def _difference(stored: StoredRows, rows: int) -> Tensor:
    """Stored source minus target history length of every row [rows] of the batch that the stored rows became."""
    if not len(stored):  # a batch of a filler
        return torch.zeros(rows, dtype=torch.int64)
    source, target = (stored.lists(f"{d}_history_item").lengths for d in ("source", "target"))
    return torch.from_numpy(np.repeat(source.astype(np.int64) - target, rows // len(stored)))


def _means(frame: pl.DataFrame, by: str, *of: str) -> pl.DataFrame:
    """Behaviours of all workers, and means of columns over them, for every value of `by`: of sums and counts."""
    sums = frame.group_by(by).agg(pl.len().cast(pl.Int64).alias("behaviours"), pl.col(*of).sum())
    whole = _of_all_workers(sums).group_by(by).agg(pl.col("behaviours", *of).sum())
    return whole.with_columns(pl.col(name) / pl.col("behaviours") for name in of).sort(by)


def _histogram(weight: pl.Series) -> pl.DataFrame:
    """Bin k holds what is nearest to 2^(k / BINS_AN_OCTAVE): equal weights of 1 stay together, however they round."""
    number = (weight.log(2) * BINS_AN_OCTAVE).round()
    counts = _of_all_workers(pl.DataFrame({"bin": number}).group_by("bin").agg(behaviours=pl.len().cast(pl.Int64)))
    counts = counts.group_by("bin").agg(pl.col("behaviours").sum()).sort("bin")
    edge = (2.0 ** ((pl.col("bin") + half) / BINS_AN_OCTAVE) for half in (-0.5, 0.5))
    return counts.select(*(e.alias(name) for e, name in zip(edge, ("lower", "upper"), strict=True)), "behaviours")


def _of_all_workers(frame: pl.DataFrame) -> pl.DataFrame:
    frames: list[Any] = [None] * world_size()
    dist.all_gather_object(frames, frame.to_dict(as_series=False))
    return pl.concat([pl.DataFrame(f, schema=frame.schema) for f in frames])


def against_truth(session: Session, found: pl.DataFrame) -> dict[str, Any] | None:
    """For planted data: mean weight of each kind, and the AUC of the categories' mean weights as a sign of help.

    The AUC asks whether a helpful behaviour's category weighs more than a harmful one's, behaviours counted each.
    """
    if not of_categories(session.folder):
        return None
    kinds = usefulness_by_category(session.folder, session.manifest)
    named = found.with_columns(kind=pl.Series([kinds[c] for c in found["category"]]))
    means = {
        str(kind): float(np.average(part["weight"], weights=part["behaviours"]))
        for (kind,), part in named.group_by("kind")
        if kind
    }
    told = named.filter(pl.col("kind").is_in(["helpful", "harmful"]))
    repeated = told["behaviours"].to_numpy()
    useful = np.repeat((told["kind"] == "helpful").to_numpy().astype(float), repeated)
    return {"mean_weight": means, "auc": auc(useful, np.repeat(told["weight"].to_numpy(), repeated))}
