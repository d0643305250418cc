"""The identity in place of the inverse Hessian: the one-step gradient (Luketina et al. 2016; DARTS' first order)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

Vector = Sequence[Tensor]


def identity(
    start: Vector,
    _hessian_vector: Callable[[Vector], Vector],
    _scale: Callable[[Vector], Vector],
    _terms: int,
    dot: Callable[[Vector, Vector], Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """p = start, and its norm: the Neumann series without a term."""
    return list(start), [dot(start, start).sqrt()]
