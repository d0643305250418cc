"""PeterRec: small adapters in a frozen encoder (Yuan et al., "Parameter-efficient transfer", SIGIR 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from cdr_dist.errors import UserError
from cdr_dist.models.causal import Block
from cdr_dist.models.encoder import Encoder, Route, Sequences

PLACES = ("serial", "parallel")


class PeterRec:
    """Two adapters a block, `serial` behind each convolution or `parallel` to it.

    Trained are the adapters, the blocks' second norms and the target's own rows; items: and the source items' rows.
    """

    def __init__(self, insertion: str = "serial", items: bool = False) -> None:
        if insertion not in PLACES:
            raise UserError(f"recipe.transfer.insertion={insertion}: choose {' or '.join(PLACES)}")
        self._serial, self._items = insertion == "serial", items

    def encoder(self, width: int, dilations: Sequence[int]) -> Encoder:
        return _Adapted(width, dilations, self._serial, self._items)


class Adapter(nn.Module):
    """W_up GELU(W_down x), to be added to what it stands beside; C -> C/4 -> C, zero at first.

    8,352 parameters at width 128.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, width // 4), nn.Linear(width // 4, width)

    def initial_values(self) -> dict[str, Tensor]:
        return {"up.weight": torch.zeros_like(self.up.weight)}

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.up(functional.gelu(self.down(x)))
        return added


class _Adapted(Encoder):
    def __init__(self, width: int, dilations: Sequence[int], serial: bool, items: bool) -> None:
        super().__init__(width, dilations)
        self._serial, self.trains_items = serial, items
        self.adapters1 = nn.ModuleList(Adapter(width) for _ in dilations)
        self.adapters2 = nn.ModuleList(Adapter(width) for _ in dilations)

    def forward(self, seen: Sequences, route: Route | None) -> Tensor:
        x = seen.rows
        for block, first, second in zip(self.blocks, self.adapters1, self.adapters2, strict=True):
            assert isinstance(block, Block)
            middle = functional.relu(block.norm1(self._with(first, block.convolution1, x)))
            x = functional.relu(block.norm2(self._with(second, block.convolution2, middle))) + x
        return x

    def _with(self, adapter: nn.Module, convolution: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = convolution(x)
        return out + adapter(out if self._serial else x)

    def trained(self) -> list[str]:
        return [name for name in super().trained() if name.startswith("adapters") or ".norm2." in name]
