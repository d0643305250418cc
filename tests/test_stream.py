"""Laws 4 and 5: every row exactly once an epoch, the same global batches on any number of workers, resume anywhere."""

from __future__ import annotations

import threading

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdr_dist.data import lanes
from cdr_dist.data.hashing import key, permutation
from cdr_dist.data.lanes import Order
from cdr_dist.data.options import StreamOptions
from cdr_dist.data.stream import Place, Stream
from cdr_dist.errors import UserError
from tests.problem import replaced


class MemoryReader:
    """Stands for the shards: row i of the split holds the number i."""

    def __init__(self, row_groups):
        self.row_groups = tuple(row_groups)
        self._starts = np.cumsum([0, *row_groups])

    def read(self, piece):
        first = int(self._starts[piece.row_group])
        return pa.table({"row": np.arange(first + piece.start, first + piece.stop)})

    def plan(self, who, row_groups): ...


def model_of_an_epoch(row_groups, lanes, window, seed, name, epoch, size):
    """The lane design in ten lines: lists of rows of each step, in lane order."""
    starts = np.cumsum([0, *row_groups])
    order = permutation(key("groups", seed, name, epoch), len(row_groups))
    rows = [(int(g), int(r)) for g in order for r in range(starts[g], starts[g + 1])]
    queues = []
    for lane in range(lanes):
        mine = [rows.pop(0) for _ in range(sum(row_groups) // lanes + (lane < sum(row_groups) % lanes))]
        groups = list(dict.fromkeys(g for g, _ in mine))
        windows = [[r for g, r in mine if g in groups[i : i + window]] for i in range(0, len(groups), window)]
        shuffles = [permutation(key("window", seed, name, epoch, lane, n), len(w)) for n, w in enumerate(windows)]
        queues.append([w[i] for w, shuffle in zip(windows, shuffles, strict=True) for i in shuffle])
    woven = [
        (lane, queues[lane][i]) for i in range(max(map(len, queues))) for lane in range(lanes) if i < len(queues[lane])
    ]
    return [[r for _, r in sorted(woven[i : i + size], key=lambda x: x[0])] for i in range(0, len(woven), size)]


def stream(row_groups, size, lanes, window, rank=0, workers=1, seed=3, name="lower"):
    return Stream(MemoryReader(row_groups), size, StreamOptions(lanes, window), seed, name, rank, workers)


def rows(stream, place):
    return stream.read(place).stored["row"].tolist()


shapes = st.fixed_dictionaries(
    {
        "row_groups": st.lists(st.integers(1, 17), min_size=1, max_size=8),
        "size": st.integers(1, 40),
        "lanes": st.integers(1, 6),
        "window": st.integers(1, 3),
    }
)


@settings(max_examples=150, deadline=None)
@given(shapes, st.integers(1, 6), st.integers(0, 2))
def test_workers_together_read_the_model_and_every_row_once(shape, workers, epoch):
    workers = min(workers, shape["lanes"])
    expected = model_of_an_epoch(shape["row_groups"], shape["lanes"], shape["window"], 3, "lower", epoch, shape["size"])
    streams = [stream(**shape, rank=r, workers=workers) for r in range(workers)]
    steps = streams[0].steps_per_epoch
    found = [[row for s in streams for row in rows(s, Place(epoch, t))] for t in range(steps)]
    assert found == expected
    assert sorted(row for step in found for row in step) == list(range(sum(shape["row_groups"])))
    assert [streams[0].read(Place(epoch, t)).global_rows for t in range(steps)] == [len(step) for step in expected]


@settings(max_examples=80, deadline=None)
@given(shapes, st.data())
def test_resume_at_any_place_on_another_number_of_workers(shape, data):
    whole = stream(**shape)
    epoch = data.draw(st.integers(0, 2))
    step = data.draw(st.integers(0, whole.steps_per_epoch - 1))
    workers = data.draw(st.integers(1, shape["lanes"]))
    place, expected = Place(0, 0), None
    while place <= Place(epoch, step):
        expected = rows(whole, place)
        place = whole.after(place)
    resumed = [stream(**shape, rank=r, workers=workers) for r in range(workers)]
    assert [row for s in resumed for row in rows(s, Place(epoch, step))] == expected


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_shares_of_lanes_differ_by_at_most_one_row(shape):
    order = Order(tuple(shape["row_groups"]), shape["lanes"], shape["window"], 3, "lower", 0)
    for t in range(order.steps(shape["size"])):
        taken = [b - a for a, b in (order.edges(lane, t, 1, shape["size"]) for lane in range(shape["lanes"]))]
        assert max(taken) - min(taken) <= 1


def test_dev_stream_is_the_same_rows_in_an_independent_order():
    groups = [1000] * 20
    lower = np.array([r for t in range(5) for r in rows(stream(groups, 4000, 4, 2), Place(0, t))])
    dev = np.array([r for t in range(5) for r in rows(stream(groups, 4000, 4, 2, name="dev"), Place(0, t))])
    assert sorted(lower) == sorted(dev) == list(range(20_000))
    # 20 shuffled groups of 1,000: of an independent order about 1 in 20,000 rows keeps its place.
    assert (lower == dev).sum() < 20
    again = np.array([r for t in range(5) for r in rows(stream(groups, 4000, 4, 2), Place(1, t))])
    assert (lower == again).sum() < 20


def test_the_next_windows_are_read_before_they_are_needed():
    class Recording(MemoryReader):
        def __init__(self, row_groups):
            super().__init__(row_groups)
            self.read_groups = []

        def read(self, piece):
            self.read_groups.append(piece.row_group)
            return super().read(piece)

    reader = Recording([40] * 8)
    one = Stream(reader, 4, StreamOptions(lanes=1, window=2), 3, "lower")
    one.read(Place(0, 0))
    assert len(reader.read_groups) == 2, "who reads a step reads a window"
    one.read(Place(0, 1))
    one._loader.submit(lambda: None).result()
    assert len(reader.read_groups) == 4
    for step in range(one.steps_per_epoch):
        one.read(Place(0, step))
    one._loader.submit(lambda: None).result()
    assert len(reader.read_groups) == 10, "every group once, and the next epoch's first window"


def test_the_windows_of_an_epoch_are_listed_once_a_window_not_once_a_step():
    class Counting(Order):
        listed = 0

        def windows(self, lane):
            Counting.listed += 1
            return super().windows(lane)

    from cdr_dist.data import stream as module

    with replaced(module, "Order", Counting):
        one = stream([10] * 16, 2, lanes=2, window=2)
        for step in range(one.steps_per_epoch):
            one.read(Place(0, step))
        one.close()
    assert one.steps_per_epoch == 80
    # The epoch's own, and of each lane the four windows that are read ahead.
    assert Counting.listed <= 2 + 2 * 4


def test_all_reading_is_in_one_thread_which_close_ends():
    class Where(MemoryReader):
        def read(self, piece):
            threads.add(threading.current_thread())
            return super().read(piece)

    threads = set()
    last = Stream(Where([5]), 4, StreamOptions(lanes=4, window=2), 3, "lower", rank=3, workers=4)
    assert [len(last.read(Place(0, step)).stored) for step in range(2)] == [1, 0]
    reading = threads.pop()
    assert not threads
    assert reading is not threading.current_thread()
    last.close()
    assert not reading.is_alive()
    assert len(last.read(Place(1, 0)).stored) == 1
    last.close()


def test_more_workers_than_lanes_is_refused():
    with pytest.raises(UserError, match=r"5 workers but stream\.lanes=4"):
        stream([10], 2, 4, 1, workers=5)


# ---- mutations that the claims above must catch --------------------------------------------------------------------


def test_a_dropped_lane_is_seen():
    from cdr_dist.data import stream as module

    shape = {"row_groups": [5, 9, 3], "size": 7, "lanes": 4, "window": 2}  # a search would go on to find the smallest
    with (
        replaced(module, "lanes_of", lambda rank, workers, n: lanes.lanes_of(rank, workers, n)[1:]),
        pytest.raises(AssertionError),
    ):
        test_workers_together_read_the_model_and_every_row_once.hypothesis.inner_test(shape, 2, 1)


def test_the_same_order_reused_is_seen():
    from cdr_dist.data import stream as module

    class Reused(Order):
        def __init__(self, *arguments):
            super().__init__(*arguments[:4], "lower", 0, *arguments[6:])

    with replaced(module, "Order", Reused), pytest.raises(AssertionError):
        test_dev_stream_is_the_same_rows_in_an_independent_order()
