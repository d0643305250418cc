"""Names for the parts of a training step: seen by torch.profiler, and by whoever counts backward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.profiler import record_function

PREFIX = "cdr."
_open: list[str] = []


@contextmanager
def span(name: str) -> Iterator[None]:
    """A part of a step. Spans may nest; the innermost one counts."""
    _open.append(name)
    try:
        with record_function(PREFIX + name) if torch.autograd._profiler_enabled() else nullcontext():
            yield
    finally:
        _open.pop()


def innermost() -> str:
    """The name of the innermost open span; '' outside."""
    return _open[-1] if _open else ""
