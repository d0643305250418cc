"""The dense parameters: one flat message a step, whose order fixes the bits, and one optimiser step a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from cdr_dist.embeddings.workers import sum_

ALIGNED = 16
"""Numbers: parameters begin at multiples of 64 bytes, as matrix products like it."""
NUMBERS = 16
"""Most scalars that travel with the gradients."""

Optimiser = Callable[[str, nn.Parameter], torch.optim.Optimizer]


class DenseStep:
    """Parameters of modules, and their gradients, as views of one tensor each.

    Gradients, and a few numbers with them, are so summed over workers in one message, and stepped by one small call a
    module. Losses are divided by the global batch size, so sums are right. make: the optimiser of all parameters of
    the module of a name, [n]. Parameters that require no gradient are left alone, and cost nothing.
    """

    def __init__(self, modules: Mapping[str, nn.Module], make: Optimiser) -> None:
        named = {name: sorted(module.named_parameters()) for name, module in modules.items()}
        parameters = {name: [p for _, p in of if p.requires_grad] for name, of in named.items()}
        parameters = {name: of for name, of in parameters.items() if of}
        like = next(p for of in named.values() for _, p in of).detach()
        sizes = {name: sum(_room(p) for p in of) for name, of in parameters.items()}
        values = like.new_zeros(sum(sizes.values()))
        self._message = like.new_zeros(len(values) + NUMBERS)
        self._flat: dict[str, nn.Parameter] = {}
        start = 0
        for name, of in parameters.items():
            flat = self._flat[name] = nn.Parameter(values[start : start + sizes[name]])
            flat.grad = self._message[start : start + sizes[name]]
            for p in of:
                place = slice(start, start + p.numel())
                values[place] = p.detach().reshape(-1)
                p.data, p.grad = values[place].view_as(p), self._message[place].view_as(p)
                start += _room(p)
        self.optimisers = {name: make(name, flat) for name, flat in self._flat.items()}

    def __call__(self, numbers: list[Tensor]) -> list[float]:
        """numbers: scalars to sum over workers along with the gradients; their sums come back."""
        sums = self._message[-NUMBERS:][: len(numbers)]
        torch.stack([n.detach().to(sums) for n in numbers], out=sums)
        sum_(self._message)
        for optimiser in self.optimisers.values():
            optimiser.step()
        found: list[float] = sums.tolist()
        self._message.zero_()
        return found

    def step(self, name: str) -> None:
        """Of one module alone."""
        gradient = self._flat[name].grad
        assert gradient is not None
        sum_(gradient)
        self.optimisers[name].step()
        gradient.zero_()


def _room(parameter: Tensor) -> int:
    return -(-parameter.numel() // ALIGNED) * ALIGNED
