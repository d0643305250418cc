"""parameters_sha256: the identity of a trained base model, whatever the number of workers that hold it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from cdr_dist.training.session import Session


def parameters_sha256(session: Session) -> str:
    """Base-model parameters in name order: name, dtype, shape, little-endian bytes of unpadded unsharded rows.

    Every worker calls it; the digest is worker 0's ('' elsewhere).
    """
    dense = {name: p.detach().cpu() for name, p in session.model.named_parameters()}
    tables = {f"table.{t}": spec for t, spec in session.tables.specs.items()}
    digest = hashlib.sha256()
    for name in sorted([*dense, *tables]):
        if name in dense:
            digest.update(f"{name} {dense[name].dtype} {tuple(dense[name].shape)}".encode())
            digest.update(_bytes(dense[name]))
            continue
        shape = (tables[name].rows, tables[name].width)
        digest.update(f"{name} {torch.float32} {shape}".encode())
        for block in session.tables.blocks(name.removeprefix("table.")):
            digest.update(_bytes(block))
    return digest.hexdigest() if session.rank == 0 else ""


def _bytes(values: Tensor) -> memoryview:
    numbers = values.contiguous().numpy()
    return numbers.astype(numbers.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data
