"""The few collectives the project uses, which also work with one worker and no process group.

Workers of one machine without accelerators exchange through memory that they share, others through torch.distributed.

`sum_over_workers` is differentiable any number of times: the derivative of a sum over workers is again a sum
over workers. What each worker differentiates is its own part of a global quantity; autograd then returns the
derivative of the whole.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cdr_dist.embeddings.shared_memory import SharedMemory


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def sum_(x: Tensor) -> None:
    """x becomes the sum of `x` (same shape everywhere) over all workers."""
    if world_size() > 1:
        shared = _shared(x)
        if shared is not None:
            shared.sum_(x)
        else:
            dist.all_reduce(x)


def exchange(values: Tensor, out: Sequence[int], into: Sequence[int]) -> Tensor:
    """Part w of `values` [n, ..], out[w] rows, goes to worker w; part w of the result, into[w] rows, came from it."""
    shared = _shared(values)
    if shared is not None:
        return shared.exchange(values, out, into)
    arriving = values.new_empty(sum(into), *values.shape[1:])
    dist.all_to_all_single(arriving, values.contiguous(), list(into), list(out))
    return arriving


def through_shared_memory(wanted: bool) -> None:
    """Whether workers of one machine use it, from the next message on; every worker says the same."""
    global _wanted
    _wanted = wanted


_wanted = True
_made: tuple[Any, SharedMemory | None] | None = None
"""The process group, and what its workers share."""


def _shared(x: Tensor) -> SharedMemory | None:
    global _made
    if x.device.type != "cpu" or not _wanted:
        return None
    group = dist.group.WORLD
    if _made is None or _made[0]() is not group:
        if _made is not None and _made[1] is not None:
            _made[1].close()
        _made = weakref.ref(group), SharedMemory.between(group)
    return _made[1]


class _SumOverWorkers(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        sum_(total)
        return total

    @staticmethod
    def backward(_ctx: Any, *gradients: Any) -> Tensor:
        return _SumOverWorkers.apply(gradients[0])


def sum_over_workers(x: Tensor) -> Tensor:
    """The sum of `x` (same shape everywhere) over all workers; differentiable, also twice."""
    return x if world_size() == 1 else _SumOverWorkers.apply(x)


def max_over_workers(x: Tensor) -> Tensor:
    """The elementwise maximum over all workers, without gradient."""
    highest = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return highest


def reduce_flat(tensors: list[Tensor]) -> list[Tensor]:
    """Sums a list of tensors over workers as one flat message, whose order fixes the bits."""
    if world_size() == 1 or not tensors:
        return tensors
    flat = torch.cat([t.detach().reshape(-1) for t in tensors])
    sum_(flat)
    return [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]
