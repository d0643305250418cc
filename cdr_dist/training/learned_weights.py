"""What the perceptron found: the weights of a training epoch's source behaviours, by category and planted kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
import torch.distributed as dist

from cdr_dist.bilevel.lookup import perceptron_input
from cdr_dist.data import storage
from cdr_dist.data.stream import Place
from cdr_dist.data.truth import FILE, usefulness_by_category
from cdr_dist.embeddings.features import ids_by_table, rows_by_feature
from cdr_dist.evaluation.metrics import auc

if TYPE_CHECKING:
    from cdr_dist.training.session import Session

MOST_STEPS = 200


@torch.no_grad()
def weights_by_category(session: Session) -> pl.DataFrame:
    """category (id), behaviours, weight (mean of w_j x B: joint training's is gamma0), score; worker 0's is whole.

    Behaviours only (label 1 where labels are sampled), of at most 200 steps of the first epoch.
    """
    perceptron = session.perceptron
    assert perceptron is not None
    feed = session.training_feed("lower", session.config.batch.size)
    feed.seek(Place())
    seen = []
    for _ in range(min(MOST_STEPS, feed.steps_per_epoch)):
        batch = feed.next().batch
        rows = session.tables.read(ids_by_table(batch.train, session.features))
        embedded = rows_by_feature(rows, batch.train, session.features)
        given = perceptron_input(session.tables, session.features, batch.histories, embedded, False)
        score = perceptron(given)
        weight = perceptron.weights(score, batch.source_valid, batch.global_rows) * batch.global_rows
        kept = batch.source_valid & ((batch.source_label > 0) | (session.manifest.label == "rating"))
        category = batch.train["source_category"].values()[kept]
        seen.append(torch.stack([category.double(), weight[kept].double(), score[kept].double()]))
    feed.close()
    values = torch.cat(seen, dim=1).cpu().numpy()
    frame = (
        pl.DataFrame({"category": values[0].astype(np.int64), "weight": values[1], "score": values[2]})
        .group_by("category")
        .agg(pl.len().alias("behaviours"), pl.col("weight").sum(), pl.col("score").sum())
    )
    frames: list[Any] = [None] * session.workers
    dist.all_gather_object(frames, frame.to_dict(as_series=False))
    return (
        pl.concat([pl.DataFrame(f) for f in frames])
        .group_by("category")
        .agg(pl.col("behaviours", "weight", "score").sum())
        .with_columns(pl.col("weight") / pl.col("behaviours"), pl.col("score") / pl.col("behaviours"))
        .sort("category")
    )


def against_truth(session: Session, found: pl.DataFrame) -> dict[str, Any] | None:
    """For planted data: mean weight of each kind, and the AUC of the categories' mean weights as a sign of help.

    The AUC asks whether a helpful behaviour's category weighs more than a harmful one's, behaviours counted each.
    """
    if not storage.exists(storage.join(session.folder, FILE)):
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
