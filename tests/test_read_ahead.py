"""Row groups read ahead: what is announced comes, bounded in number and bytes, and errors in their place."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.lanes import Piece
from cdr_dist.data.read_ahead import ReadAhead
from cdr_dist.data.shards import ShardReader
from tests import datasets

ROWS = 128


class Source:
    """Fetches tables of 1 KiB; remembers what was fetched, and the most fetches at a time."""

    def __init__(self, seconds=0.0):
        self.fetched, self.most, self._now, self._seconds = [], 0, 0, seconds
        self._lock = threading.Lock()

    def __call__(self, index):
        with self._lock:
            self.fetched.append(index)
            self._now += 1
            self.most = max(self.most, self._now)
        time.sleep(self._seconds)
        with self._lock:
            self._now -= 1
        if index < 0:
            raise ValueError(f"no {index}")
        return pa.table({"row": pa.array([index] * ROWS, pa.int64())})


def settled(ahead):
    """Waits until no fetch is under way."""
    end = time.monotonic() + 10
    while ahead.running and time.monotonic() < end:
        time.sleep(0.001)


def test_streams_that_share_a_reader_fetch_a_row_group_once(monkeypatch):
    folder = str(datasets.rated())
    manifest = read_manifest(folder)
    reader, source = ShardReader(folder, manifest, "train", ["user"]), Source(seconds=0.05)
    monkeypatch.setattr(reader, "_ahead", SimpleNamespace(get=source))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: reader.read(Piece(0, 0, ROWS)), range(8)))
    assert source.fetched == [0]
    assert all(table.num_rows == ROWS for table in found)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_plan_gives_what_is_asked_for(data):
    source = Source()
    ahead = ReadAhead(source, data.draw(st.sampled_from([0, 1, 5000, 1 << 20])), data.draw(st.integers(1, 4)))
    groups = st.lists(st.integers(0, 9), max_size=6)
    for _ in range(data.draw(st.integers(1, 12))):
        if data.draw(st.booleans()):
            ahead.plan(data.draw(st.sampled_from("ab")), data.draw(groups))
        else:
            index = data.draw(st.integers(0, 9))
            assert ahead.get(index)["row"].to_pylist() == [index] * ROWS
    settled(ahead)


def test_what_is_announced_is_fetched_once_and_not_again():
    source = Source()
    ahead = ReadAhead(source, 1 << 20)
    ahead.plan("lane", [3, 1, 2])
    settled(ahead)
    assert sorted(source.fetched) == [1, 2, 3]
    for index in (3, 1, 2):
        ahead.get(index)
    settled(ahead)
    assert sorted(source.fetched) == [1, 2, 3]
    ahead.get(3)
    assert source.fetched[3:] == [3]


def test_bytes_and_threads_are_bounded():
    source = Source(0.01)
    ahead = ReadAhead(source, 6 * 8 * ROWS, threads=2)
    ahead.plan("lane", list(range(40)))
    settled(ahead)
    assert len(source.fetched) == 6
    assert source.most == 2
    for index in range(40):
        ahead.get(index)
        settled(ahead)
        assert len(source.fetched) - index - 1 <= 6
    assert sorted(source.fetched) == list(range(40))


def test_another_plan_drops_what_nobody_wants_any_more():
    source = Source()
    ahead = ReadAhead(source, 2 * 8 * ROWS)
    ahead.plan("lane", [0, 1])
    settled(ahead)
    ahead.plan("lane", [5, 6])
    settled(ahead)
    assert sorted(source.fetched) == [0, 1, 5, 6]


def test_an_error_comes_to_who_asks_and_a_later_ask_tries_again():
    source = Source()
    ahead = ReadAhead(source, 1 << 20)
    ahead.plan("lane", [-1, 4])
    settled(ahead)
    assert ahead.get(4)["row"][0].as_py() == 4
    for _ in range(2):
        with pytest.raises(ValueError, match="no -1"):
            ahead.get(-1)
    assert source.fetched.count(-1) == 2
