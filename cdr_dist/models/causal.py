"""Dilated causal convolutions over sequences: the blocks of NextItNet (Yuan et al., WSDM 2019; UAF, eq. 1-2).

A sequence begins in the first column and padding stands behind its end, so that no real position ever sees padding:
what comes before the first item is zero, at every layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

KERNEL = 3
BEGINNING = 0.1
"""Weights of a block's second norm at first. With 1 eight blocks add forty times an item's row to it, and what is learned
at first is to undo that: after one epoch of data=demo_sequences the validation loss is 4.91, with 0.1 it is 4.72
(width 64, tables.lr=0.1 and 0.03 alike)."""
DILATIONS = (1, 4) * 4
"""Of the blocks' first convolutions; a second one has twice as much: {1, 2, 4, 8} four times over."""


class CausalConvolution(nn.Module):
    """y_t = b + W [x_(t-2d); x_(t-d); x_t], as one matrix product. x, y: [n, length, width]."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.weight = nn.Parameter(torch.empty(width, KERNEL * width))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.kaiming_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        length, reach = x.shape[1], (KERNEL - 1) * self.dilation
        early = functional.pad(x, (0, 0, reach, 0))
        seen = [early[:, i * self.dilation : i * self.dilation + length] for i in range(KERNEL)]
        return functional.linear(torch.cat(seen, dim=2), self.weight, self.bias)


class Block(nn.Module):
    """F of E_l = F(E_(l-1)) + E_(l-1) (UAF, eq. 2): convolution, layer norm, ReLU, twice; [n, length, width].

    2 x (3 x width + 3) x width parameters: 99,072 at width 128.
    """

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.convolution1, self.norm1 = CausalConvolution(width, dilation), nn.LayerNorm(width)
        self.convolution2, self.norm2 = CausalConvolution(width, 2 * dilation), nn.LayerNorm(width)

    def initial_values(self) -> dict[str, Tensor]:
        return {"norm2.weight": torch.full_like(self.norm2.weight, BEGINNING)}

    def forward(self, x: Tensor) -> Tensor:
        middle = functional.relu(self.norm1(self.convolution1(x)))
        return functional.relu(self.norm2(self.convolution2(middle)))


def blocks_of(width: int, dilations: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(Block(width, dilation) for dilation in dilations)


def receptive_field(dilations: Sequence[int]) -> int:
    """Positions, its own among them, that an output of blocks of these dilations depends on: 121 by default."""
    return 1 + sum((KERNEL - 1) * (dilation + 2 * dilation) for dilation in dilations)
