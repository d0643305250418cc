"""Compiled loops work where nothing can be written."""

from __future__ import annotations

import numba
import pytest

from cdr_dist.compiled import compiled


@pytest.mark.parametrize("writable", [True, False])
def test_without_a_place_to_keep_it_every_process_compiles(monkeypatch, writable):
    kept, njit = [], numba.njit

    def where(cache=False, **options):
        if cache and not writable:
            raise RuntimeError("cannot cache function: no locator available")  # as numba says it
        kept.append(cache)
        return njit(**options)

    monkeypatch.setattr(numba, "njit", where)

    @compiled()
    def twice(x):
        return 2 * x

    monkeypatch.undo()  # numba itself uses it when it first compiles
    assert kept == [writable]
    assert twice(4) == 8
