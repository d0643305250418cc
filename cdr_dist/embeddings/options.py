"""Options and shapes of embedding tables; apart from them, because a driver reads these without loading TorchRec."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from cdr_dist.errors import UserError, nearest

OPTIMISERS = ("rowwise_adagrad", "adagrad", "sgd", "adam")
_ROWS_MULTIPLE = 64
"""A row-wise shard without rows crashes the lookup: 64 rows more than suffice for 64 workers."""


@dataclass
class TableOptions:
    """How the tables are stored and trained."""

    width: int = 12
    """Values per row; FBGEMM needs a multiple of 4."""
    lr: float = 0.1
    """Rate of the rows; dense parameters have their own, dense.lr."""
    optimiser: str = "rowwise_adagrad"
    """rowwise_adagrad (one statistic a row), adagrad, sgd; adam on CUDA only."""
    init_std: float = 0.1
    """Standard deviation of a row's first values."""
    weight_decay: float = 0.0
    """Rowwise_adagrad only: a row loses lr x weight_decay of itself whenever it is trained (decoupled)."""
    start: dict[str, str] = field(default_factory=dict)
    """Typed tables.start.TABLE=FILE: a Parquet file, local or s3://, with the columns id (the key as in the logs) and
    vector (a list of `width` numbers); rows of these keys start from their vectors, the others as usual."""

    def __post_init__(self) -> None:
        if self.width <= 0 or self.width % 4:
            raise UserError(f"tables.width={self.width}: must be a positive multiple of 4")
        if self.optimiser not in OPTIMISERS:
            raise UserError(f"tables.optimiser={self.optimiser}: {nearest(self.optimiser, list(OPTIMISERS))}")
        if not 0 <= self.lr < math.inf:
            raise UserError(f"tables.lr={self.lr}: must be finite and not negative")
        if self.weight_decay < 0:
            raise UserError(f"tables.weight_decay={self.weight_decay}: must not be negative")
        if self.weight_decay and self.optimiser != "rowwise_adagrad":
            raise UserError(f"tables.weight_decay: FBGEMM has it for rowwise_adagrad only, not for {self.optimiser}")


@dataclass(frozen=True)
class TableSpec:
    """One table: `rows` ids 0..rows-1, of which 0 is padding (reads as zeros, never trains)."""

    name: str
    rows: int
    width: int
    init_std: float

    @property
    def padded_rows(self) -> int:
        return -(-self.rows // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
