"""The upper level's optimiser: AdaGrad with one step size for all parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class AdaGradNorm(torch.optim.Optimizer):
    """x <- x - lr g / sqrt(sum over steps of |g|^2), |g| over a parameter group (Ward, Wu & Bottou, ICML 2019).

    A hypergradient is a small signal in much noise. Steps of one size for all parameters keep its direction, where Adam
    and AdaGrad make a parameter of pure noise move as far as one with signal; and as they shrink with 1 / sqrt(step),
    signal adds up while noise averages out. Invariant to the scale of the loss. Gradients are equal on all workers.
    """

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "square": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            group["square"] += float(sum(p.grad.double().square().sum() for p in held))
            for p in held if group["square"] else []:
                p.mul_(1.0 - group["lr"] * group["weight_decay"]).sub_(
                    p.grad, alpha=group["lr"] / group["square"] ** 0.5
                )
