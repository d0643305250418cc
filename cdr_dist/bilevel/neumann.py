"""The truncated Neumann series for an inverse Hessian times a vector (Lorraine et al. 2020; BIAO eq. 14)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

Vector = Sequence[Tensor]


def neumann(
    start: Vector,
    hessian_vector: Callable[[Vector], Vector],
    scale: Callable[[Vector], Vector],
    terms: int,
    dot: Callable[[Vector, Vector], Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """p = sum over n = 0..terms of v_n with v_0 = start and v_(n+1) = v_n - scale(H v_n), and the norms |v_n|.

    With scale = alpha this is the released code's series, whose sum is not rescaled by alpha. With a diagonal
    preconditioner P and start = P g it is the series of (P H)^-1 P g. A growing |v_n| means that it diverges.
    """
    v = list(start)
    total = list(v)
    norms = [dot(v, v).sqrt()]
    for _ in range(terms):
        step = scale(hessian_vector(v))
        v = [a - b for a, b in zip(v, step, strict=True)]
        total = [a + b for a, b in zip(total, v, strict=True)]
        norms.append(dot(v, v).sqrt())
    return total, norms
