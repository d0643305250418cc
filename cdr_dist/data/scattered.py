"""Arrays that lie in several places, read by address in compiled loops that do not hold Python's lock.

Rows of a batch come from all lanes' windows, which stay where they were decoded. numpy would go through each of them
in turn, under the lock, which training waits for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba.extending import intrinsic
from numpy.typing import NDArray

from cdr_dist.compiled import compiled


class Scattered:
    """Arrays of one type, one after the other by number: `element(addresses[number], index, like)` in a loop."""

    def __init__(self, arrays: Sequence[NDArray]) -> None:
        self._alive = [np.ascontiguousarray(array) for array in arrays]
        self.dtype = self._alive[0].dtype
        assert all(array.dtype == self.dtype for array in self._alive)
        self.addresses = np.array([a.__array_interface__["data"][0] for a in self._alive], dtype=np.int64)
        self.like = np.empty(0, dtype=self.dtype)

    def gather(self, place: NDArray[np.int32], row: NDArray[np.int64], dtype: Any = None) -> NDArray:
        """Element row[i] of array place[i], [n]."""
        found = np.empty(len(row), dtype=dtype or self.dtype)
        _gather(self.addresses, self.like, place, row, found)
        return found


def _element(_typing: Any, address: Any, index: Any, like: Any) -> Any:
    """The element at `index` of the array at `address`, whose type is that of `like`. Nothing is checked."""
    signature = like.dtype(address, index, like)

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        kind = context.get_data_type(like.dtype)
        start = builder.inttoptr(arguments[0], kind.as_pointer())
        return builder.load(builder.gep(start, [arguments[1]], source_etype=kind), typ=kind)

    return signature, generate


element: Any = intrinsic(_element)
"""In a compiled loop: element(address, index, like), see `_element`."""


@compiled()
def _gather(addresses: Any, like: Any, place: Any, row: Any, found: Any) -> None:
    for i in range(len(row)):
        found[i] = element(addresses[place[i]], row[i], like)
