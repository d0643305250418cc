"""Conjugate gradients for an inverse Hessian times a vector (Hestenes & Stiefel 1952; Pedregosa 2016)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Vector = Sequence[Tensor]


def conjugate_gradient(
    start: Vector,
    hessian_vector: Callable[[Vector], Vector],
    scale: Callable[[Vector], Vector],
    terms: int,
    dot: Callable[[Vector, Vector], Tensor],
    tolerance: float = 0.0,
) -> tuple[list[Tensor], list[Tensor]]:
    """p with H p = start, at most `terms` products, and the norms of the residuals start - H p before each of them.

    scale: a positive preconditioner, about the inverse of H. It ends where a residual is below `tolerance` times the
    first, and at a direction without positive curvature: H of a network is not positive everywhere, and what lies
    beyond is no minimum of the quadratic model (Steihaug 1983). Without any such direction: the preconditioned start.
    """
    total = [torch.zeros_like(v) for v in start]
    residual, norms, moved = list(start), [], False
    z = list(scale(residual))
    direction, fit = list(z), dot(residual, z)
    for _ in range(terms):
        norms.append(dot(residual, residual).sqrt())
        if float(norms[-1]) <= tolerance * float(norms[0]):
            return total, norms
        product = hessian_vector(direction)
        curvature = dot(direction, product)
        if not float(curvature) > 0:
            break
        moved, step = True, fit / curvature
        total = [a + step * d for a, d in zip(total, direction, strict=True)]
        residual = [r - step * h for r, h in zip(residual, product, strict=True)]
        z = list(scale(residual))
        before, fit = fit, dot(residual, z)
        direction = [a + fit / before * d for a, d in zip(z, direction, strict=True)]
    norms.append(dot(residual, residual).sqrt())
    return (total if moved else list(scale(start))), norms
