"""Workers without a model: real streams, feeds and checkpoints, a state that shows every mistake, and disasters."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import torch

from cdr_dist import crash_points
from cdr_dist.data import local_files
from cdr_dist.data.feed import Feed
from cdr_dist.data.options import StreamOptions
from cdr_dist.data.stream import Stream
from cdr_dist.training.checkpoint import Checkpoints, Progress
from tests.storage_model import ROWS, State


class Crash(BaseException):
    """Stands for SIGKILL."""


class Memory:
    """A reader of row groups that hold example ids."""

    def __init__(self, groups):
        self.row_groups = tuple(groups)
        self._tables, first = [], 0
        for n in groups:
            self._tables.append(pa.table({"example_id": pa.array(range(first, first + n), pa.int64())}))
            first += n

    def read(self, piece):
        return self._tables[piece.row_group].slice(piece.start, piece.rows)

    def plan(self, who, row_groups): ...


class Talks:
    """The talk of workers that are threads."""

    def __init__(self, workers):
        self.barrier, self._said = threading.Barrier(workers, timeout=20), [None] * workers

    def of(self, rank):
        return SimpleNamespace(broadcast=lambda v: self._all(rank, v)[0], gather=lambda v: self._all(rank, v))

    def _all(self, rank, value):
        self._said[rank] = value
        self.barrier.wait()
        said = list(self._said)
        self.barrier.wait()
        return said


class Worker:
    """What `Checkpoints` and the stream see of a session. Rows of the table are sharded as TorchRec does."""

    def __init__(self, shape, rank, workers):
        self.rank, self.workers, self.folder = rank, workers, "data"
        self.device, self.passes = torch.device("cpu"), {}
        self.manifest = SimpleNamespace(checksum="data", is_or_was=lambda checksum: checksum == "data")
        block = -(-ROWS // workers)
        self.first, stop = min(rank * block, ROWS), min((rank + 1) * block, ROWS)
        start = State()
        self.weights = torch.tensor(start.weights[self.first : stop], dtype=torch.float32).view(-1, 1)
        self.updates = torch.tensor(start.updates[self.first : stop], dtype=torch.float32)
        self.model = torch.nn.Linear(1, 1, bias=False)
        self.model.weight.data.fill_(start.dense)
        self.perceptron = self.dev_head = None
        self.optimisers = {}
        self.tables = SimpleNamespace(
            shards=lambda: {"t": (self.first, self.weights)},
            optimiser_shards=lambda: {"t": [self.updates]},
            updates=0,
        )
        options = StreamOptions(lanes=shape.lanes, window=shape.window)
        reader = Memory(shape.groups)
        stream = Stream(reader, shape.rows_per_step, options, shape.seed, "lower", rank=rank, workers=workers)
        self.feed = Feed(stream, lambda block: [rows.stored["example_id"].tolist() for rows in block.steps])


class World:
    """The workers of one start of a run. `crash_at`: (point, n): all die when a point is passed for the n-th time."""

    def __init__(self, folder, shape, workers, keep, in_background, crash_at=None):
        self._talks = [Talks(workers), Talks(workers)]
        self._crash_at, self._passed, self._lock = crash_at, 0, threading.Lock()
        self._dead = False
        self.progress = Progress(data_checksum="data")
        self.workers = [Worker(shape, rank, workers) for rank in range(workers)]
        with self._crashing():
            self._checkpoints = [
                Checkpoints(folder, w, keep, in_background, talk=lambda own=False, r=w.rank: self._talks[own].of(r))
                for w in self.workers
            ]

    def resume(self):
        with self._crashing():
            for worker, progress in zip(self.workers, self._everywhere(self._load), strict=True):
                if progress is not None:
                    self.progress = progress
                    worker.feed.seek(progress.lower)

    def train(self, steps):
        for _ in range(steps):
            ids = [i for w in self.workers for i in w.feed.next().batch]
            for w in self.workers:
                w.feed.peek()  # as an upper update looks ahead
                for row in range(w.first, w.first + len(w.weights)):
                    added = sum(i + 1 for i in ids if i % ROWS == row)
                    if added:
                        at = row - w.first
                        w.weights[at] = (3 * w.weights[at] + added) % 65521
                        w.updates[at] += 1
                w.model.weight.data.mul_(5).add_(sum(ids)).remainder_(65521)
            self.progress.step += 1

    def save(self, best, wait=True):
        self.progress.lower = self.workers[0].feed.place
        self.progress.best_step = best
        with self._crashing():
            self._everywhere(lambda c, _: c.save(self.progress))
            if wait:
                self._everywhere(lambda c, _: c.wait())

    def wait(self):
        with self._crashing():
            self._everywhere(lambda c, _: c.wait())

    def state(self):
        return State(
            [int(v) for w in self.workers for v in w.weights.flatten()],
            [int(v) for w in self.workers for v in w.updates],
            int(self.workers[0].model.weight),
        )

    def end(self):
        for talk in self._talks:
            talk.barrier.abort()
        for worker, checkpoints in zip(self.workers, self._checkpoints, strict=True):
            worker.feed.close()
            checkpoints.close()

    def _load(self, checkpoints, worker):
        found = checkpoints.newest()
        return checkpoints.load(found) if found else None

    def _everywhere(self, call):
        """On all workers at once; the first error is everybody's, Crash before any other."""
        answers = [None] * len(self.workers)

        def run(rank):
            try:
                answers[rank] = (call(self._checkpoints[rank], self.workers[rank]), None)
            except BaseException as error:
                if isinstance(error, Crash):
                    self._die()
                answers[rank] = (None, error)

        threads = [threading.Thread(target=run, args=(w.rank,)) for w in self.workers[1:]]
        for thread in threads:
            thread.start()
        run(0)
        for thread in threads:
            thread.join()
        errors = sorted((e for _, e in answers if e), key=lambda e: (not isinstance(e, Crash), _broken(e)))
        if errors:  # those whose peer died while it wrote in the background only see that it does not answer
            raise Crash if self._dead and _broken(errors[0]) else errors[0]
        return [value for value, _ in answers]

    @contextlib.contextmanager
    def _crashing(self):
        before = crash_points._point
        crash_points._point = self._point
        try:
            yield
        finally:
            if self._crash_at is None or self._passed < self._crash_at[1]:
                # What still runs in the background is not to crash later.
                for c in getattr(self, "_checkpoints", []) if self._crash_at else []:
                    with contextlib.suppress(BaseException):
                        if c._writing is not None:
                            c._writing.result()
            crash_points._point = before

    def _point(self, name):
        if self._crash_at is None:
            return
        with self._lock:
            if self._passed >= self._crash_at[1]:
                raise Crash  # dead already
            self._passed += name == self._crash_at[0]
            if self._passed < self._crash_at[1]:
                return
        self._die()
        raise Crash

    def _die(self):
        self._dead = True
        for talk in self._talks:
            talk.barrier.abort()


def _broken(error):
    return isinstance(error, threading.BrokenBarrierError)


# ---- disasters -------------------------------------------------------------------------------------------------------


class Disk:
    """Remembers what reached the disk: `lose_power` takes away contents and names that nobody asked to be kept."""

    def __init__(self):
        self._contents, self._names = {}, {}

    @contextlib.contextmanager
    def watched(self):
        real = os.fsync

        def fsync(file):
            found = os.fstat(file)
            if os.path.isdir(f"/proc/self/fd/{file}"):
                self._names[found.st_ino] = set(os.listdir(file))
            else:
                self._contents[found.st_ino] = found.st_size

        local_files.os.fsync = fsync
        try:
            yield self
        finally:
            local_files.os.fsync = real

    def lose_power(self, folder):
        for path in [folder, *sorted(p for p in folder.rglob("*") if p.is_dir())]:
            if not path.exists():
                continue
            known = self._names.get(path.stat().st_ino, set())
            for child in list(path.iterdir()):
                if child.name not in known:
                    shutil.rmtree(child) if child.is_dir() else child.unlink()
                elif child.is_file() and self._contents.get(child.stat().st_ino) != child.stat().st_size:
                    child.write_bytes(b"")


def damage(folder: Path, which, how):
    """Damages a file of a checkpoint -> its name. how: a number that says what is done, and where."""
    path = sorted(folder.iterdir())[which % len(list(folder.iterdir()))]
    content, draw = bytearray(path.read_bytes()), random.Random(how)
    kind = draw.choice(["flip", "cut", "remove", "zero"]) if content else "remove"
    if kind == "remove":
        path.unlink()
        return path.name, kind
    at = draw.randrange(len(content))
    if kind == "flip":
        content[at] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del content[at:]
    else:
        content[at] = 0 if content[at] else 1
    path.write_bytes(content)
    return path.name, kind
