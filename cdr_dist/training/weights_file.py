"""The Parquet file of all source behaviours with their weights, written as they are found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from cdr_dist.bilevel.relative_weights import relative_weights
from cdr_dist.data import storage
from cdr_dist.data.keys import Keys
from cdr_dist.training.explain import Behaviours, everyones, typical

if TYPE_CHECKING:
    from cdr_dist.training.session import Session

SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("item", pa.string()),
        ("category", pa.string()),
        ("label", pa.float32()),
        ("timestamp", pa.int64()),
        ("gamma_1", pa.float32()),
        ("gamma_2", pa.float32()),
        ("score", pa.float32()),
        ("weight", pa.float64()),
    ]
)
ROW_GROUP_ROWS = 1 << 17


def write_weights(session: Session, out: str, most: int = 0) -> dict[str, int | float] | None:
    """Two passes over the dataset: what weights are relative to, then the weights. Worker 0 writes and returns counts.

    A collective call. most: training rows of the first pass, 0 for all. In memory stay a step and a row group, and on
    worker 0 the vocabularies. The file appears when it is whole; its rows and their order do not depend on the number
    of workers.
    """
    perceptron = session.perceptron
    assert perceptron is not None
    if session.rank:
        typical(session, most)
        for _ in everyones(session):
            pass
        return None
    keys = {name: Keys(session.folder, session.manifest, name) for name in ("user", "source_item", "source_category")}
    behaviours = 0
    with weights_file(out) as write:
        relative_to = typical(session, most)
        for found in everyones(session):
            weight = relative_weights(perceptron, found.score.to(session.device), relative_to.value)
            write(_table(found, weight.cpu().numpy(), keys))
            behaviours += len(found)
    gamma = float(perceptron.gamma.detach())
    return {"behaviours": behaviours, "relative_to_behaviours": relative_to.behaviours, "gamma": gamma}


@contextmanager
def weights_file(uri: str) -> Iterator[Callable[[pa.Table], None]]:
    """A function that takes tables of SCHEMA, which are written in row groups of ROW_GROUP_ROWS."""
    with (
        storage.open_output(uri) as out,
        pq.ParquetWriter(out, SCHEMA, compression="zstd", write_page_checksum=True) as writer,
    ):
        held = SCHEMA.empty_table()

        def write(table: pa.Table) -> None:
            nonlocal held
            held = pa.concat_tables([held, table])
            while held.num_rows >= ROW_GROUP_ROWS:
                writer.write_table(held.slice(0, ROW_GROUP_ROWS))
                held = held.slice(ROW_GROUP_ROWS)

        yield write
        if held.num_rows:
            writer.write_table(held)


def _table(found: Behaviours, weight: object, keys: dict[str, Keys]) -> pa.Table:
    columns = [
        keys["user"].of(found.user.numpy()),
        keys["source_item"].of(found.item.numpy()),
        keys["source_category"].of(found.category.numpy()),
        found.label.numpy(),
        found.timestamp.numpy(),
        found.global_part.numpy(),
        found.local_part.numpy(),
        found.score.numpy(),
        weight,
    ]
    return pa.table(columns, schema=SCHEMA)
