"""Rows a second of our batches against a bare pyarrow scan of the same columns, local and from an object store."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from torch import Tensor

from cdr_dist.data import storage
from cdr_dist.data.batch import Batch
from cdr_dist.errors import UserError
from tools.bench_case import Build, Case
from tools.bench_data import Shape, written
from tools.bench_training import Training

STORE = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_DEFAULT_REGION": "us-east-1"}


def cases(quick: bool, data: str) -> dict[str, Build]:
    places = ["local"] if quick else ["local", "S3"]
    return {
        f"{place}, {recipe}, batch {batch}": partial(case, quick, place, recipe, batch)
        for place in places
        for recipe in ("joint", "biao")
        for batch in ([32] if quick else [256, 2048])
    }


def case(quick: bool, place: str, recipe: str, batch: int, held: ExitStack) -> Case:
    """KeyedJaggedTensors built ahead by the feed's thread as in training; epoch follows upon epoch.

    A turn of ours takes an epoch's steps from where the last one stopped, a turn of the baseline every row once.
    """
    rows = 400 if quick else 1_600_000  # 10 row groups a lane: an epoch is several windows
    folder = written(held, Shape(rows, rows // 8, rows // 8, rows // 16))
    session = Training(held, folder, [f"recipe={recipe}", f"batch.size={batch}"]).session
    columns = session.builder.columns("train")
    shards = [shard.path for shard in session.manifest.shards["train"]]
    decoded = pq.ParquetFile(f"{folder}/{shards[0]}").read_row_group(0, columns=columns)
    if place == "S3":
        folder = _uploaded(folder, held)
        session.folder = folder
    feed = session.training_feed("lower", batch)
    held.callback(feed.close)
    steps = feed.steps_per_epoch
    first = feed.next().batch  # the first windows, which every later epoch finds read

    def ours() -> None:
        for _ in range(steps):
            feed.next()

    def scan() -> None:
        seen = 0
        for shard in shards:
            with _opened(storage.join(folder, shard)) as file:
                for rows_of in pq.ParquetFile(file, pre_buffer=True).iter_batches(columns=columns, use_threads=False):
                    seen += len(rows_of)
        assert seen == rows

    units = (rows / 1000, rows / 1000)
    nbytes = 1000 * (decoded.nbytes / len(decoded) + _nbytes(first) / len(first))
    return Case(0.6, ours, scan, unit="1,000 rows", units=units, nbytes=nbytes, rounds=5)


def _nbytes(batch: Batch) -> int:
    train = (batch.train.values(), batch.train.lengths())
    jagged = (*train, *(part for history in batch.histories.values() for part in vars(history).values()))
    return sum(x.nbytes for x in (*jagged, *vars(batch).values()) if isinstance(x, Tensor))


def _opened(uri: str) -> Any:
    """Without the deadlines and tries of ours."""
    if storage.is_local(uri):
        return Path(uri).open("rb")
    import s3fs

    return s3fs.S3FileSystem().open(uri, "rb")


def _uploaded(folder: str, held: ExitStack) -> str:
    """The dataset on a test server for S3 in a process of its own, on loopback."""
    import s3fs

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(port,), daemon=True)
    server.start()
    held.callback(server.join)
    held.callback(server.terminate)
    os.environ.update(STORE | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"})
    _wait_for(port)
    store = s3fs.S3FileSystem()
    store.mkdir("bench")
    store.put(folder, "bench/data", recursive=True)
    return "s3://bench/data"


def _serve(port: int) -> None:
    from moto.server import main

    main(["-H", "127.0.0.1", "-p", str(port)])


def _wait_for(port: int) -> Any:
    for _ in range(300):
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise UserError("the test server for S3 does not answer within 30 s")
