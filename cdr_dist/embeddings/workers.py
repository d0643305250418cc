"""The few collectives the project uses, which also work with one worker and no process group.

`sum_over_workers` is differentiable any number of times: the derivative of a sum over workers is again a sum
over workers. What each worker differentiates is its own part of a global quantity; autograd then returns the
derivative of the whole.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class _SumOverWorkers(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
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
    dist.all_reduce(flat)
    return [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]
