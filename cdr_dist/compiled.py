"""Loops that numba compiles when they are first called; they do not hold Python's lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(**options: Any) -> Callable[[Any], Any]:
    """A decorator. What was compiled is kept beside the source or in the user's cache folder, where one of them can be
    written (NUMBA_CACHE_DIR names another); where none can, as in a read-only container, every process compiles.
    """

    def of(function: Any) -> Any:
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # no place to keep it
            return numba.njit(nogil=True, **options)(function)

    return of
