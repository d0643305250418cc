"""Fine-tuning for all users alike: everything, the last blocks, or nothing but the target's own rows."""

from __future__ import annotations

from collections.abc import Sequence

from cdr_dist.errors import UserError
from cdr_dist.models.encoder import Encoder


class FineTune:
    """Finetune-All, -Last1, -Last2 and -CLS (UAF, section 4.2): `last` blocks are trained (-1: all, 0: none).

    items: whether the source items' rows are, too.
    """

    def __init__(self, last: int = -1, items: bool = True) -> None:
        if last < -1:
            raise UserError(f"recipe.transfer.last={last}: -1 (all blocks) or how many are trained")
        self._last, self._items = last, items

    def encoder(self, width: int, dilations: Sequence[int]) -> Encoder:
        if self._last > len(dilations):
            raise UserError(f"recipe.transfer.last={self._last}: the model has {len(dilations)} blocks")
        first = 0 if self._last < 0 else len(dilations) - self._last
        return _LastBlocks(width, dilations, first, self._items)


class _LastBlocks(Encoder):
    def __init__(self, width: int, dilations: Sequence[int], first: int, items: bool) -> None:
        super().__init__(width, dilations)
        self._first, self.trains_items = first, items

    def trained(self) -> list[str]:
        kept = tuple(f"blocks.{i}." for i in range(self._first, len(self.blocks)))
        return [name for name in super().trained() if name.startswith(kept)]
