"""The dense parameters: one flat message a step, whose order fixes the bits, then their optimisers."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cdr_dist.embeddings.workers import world_size


class DenseStep:
    """Sums the gradients of all groups and a few numbers over workers in one all_reduce, then steps the optimisers.

    groups: name -> (module, optimiser). Losses are divided by the global batch size, so sums are right.
    """

    def __init__(self, groups: dict[str, tuple[nn.Module, torch.optim.Optimizer]]) -> None:
        self._optimisers = [optimiser for _, optimiser in groups.values()]
        self._parameters = [
            p for _, (module, _) in sorted(groups.items()) for _, p in sorted(module.named_parameters())
        ]

    def __call__(self, numbers: list[Tensor]) -> list[float]:
        """numbers: scalars to sum over workers along with the gradients; their sums come back."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        flat = torch.cat([g.reshape(-1) for g in gradients] + [n.detach().reshape(1).to(gradients[0]) for n in numbers])
        if world_size() > 1:
            dist.all_reduce(flat)
        parts = flat.split([p.numel() for p in self._parameters] + [1] * len(numbers))
        for parameter, part in zip(self._parameters, parts, strict=False):
            parameter.grad = part.view_as(parameter)
        for optimiser in self._optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return [float(part) for part in parts[len(self._parameters) :]]
