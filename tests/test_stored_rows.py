"""Rows that lie in several decoded tables, against pyarrow's `take` and Python's lists."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from cdr_dist.data.stored_rows import Columns, StoredRows

values = st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=6)


def table(lists):
    ids = pa.array(range(len(lists)), pa.int32())
    return pa.table({"id": ids, "label": ids.cast(pa.float32()), "list": pa.array(lists, pa.list_(pa.int32()))})


@settings(max_examples=150, deadline=None)
@given(st.lists(values, min_size=1, max_size=3), st.data())
def test_rows_of_several_tables_are_those_that_were_asked_for(tables, data):
    whole = [table(lists) for lists in tables]
    # A window is made of slices of row groups.
    columns = [Columns(pa.concat_tables([of.slice(0, 1), of.slice(1)])) for of in whole]
    parts = data.draw(
        st.lists(
            st.integers(0, len(whole) - 1).flatmap(
                lambda n: st.tuples(
                    st.just(n), st.lists(st.integers(0, len(tables[n]) - 1), max_size=5) if tables[n] else st.just([])
                )
            ),
            min_size=1,
            max_size=6,
        )
    )
    rows = StoredRows.joined((columns[n], np.array(row, dtype=np.int64)) for n, row in parts)
    expected = [(n, i) for n, row in parts for i in row]
    assert len(rows) == len(expected)
    assert rows["id"].tolist() == [i for _, i in expected]
    assert rows["id"].dtype == np.int64
    assert rows["label"].tolist() == [float(i) for _, i in expected]
    lists = [tables[n][i] for n, i in expected]
    found, lengths = rows.lists("list").of(np.arange(len(rows)))
    assert lengths.tolist() == [len(each) for each in lists]
    assert found.tolist() == [value for each in lists for value in each]
    asked = np.repeat(np.arange(len(lists)), 2)
    index = np.array([i for each in lists for i in (0, max(len(each) - 1, 0))], dtype=np.int64)
    picked = rows.lists("list").pick(asked, index, otherwise=-1)
    assert picked.tolist() == [each[i] if each else -1 for each in lists for i in (0, -1)]
    value = np.array([data.draw(st.integers(0, 99)) if not each else each[-1] - i % 2 for i, each in enumerate(lists)])
    found = rows.lists("list").contain(asked, np.repeat(value, 2))
    assert found.tolist() == [v in each for v, each in zip(value, lists, strict=True) for _ in range(2)]
    split = data.draw(st.integers(0, len(expected)))
    first, second = rows.cut([split, len(expected) - split])
    assert first["id"].tolist() + second["id"].tolist() == rows["id"].tolist()
    assert second.lists("list").lengths.tolist() == [len(each) for each in lists[split:]]


def test_a_table_with_its_own_order():
    rows = StoredRows.of(table([[1, 2], [], [3]]))
    assert rows["id"].tolist() == [0, 1, 2]
    assert rows.lists("list").of(np.arange(3))[0].tolist() == [1, 2, 3]
    empty = StoredRows.of(table([[1]]).slice(0, 0))
    assert len(empty) == 0
    assert len(empty["label"]) == len(empty.lists("list").lengths) == 0
