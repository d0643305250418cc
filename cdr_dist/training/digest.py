"""parameters_sha256: the identity of a trained base model, whatever the number of workers that hold it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cdr_dist.training.session import Session


def parameters_sha256(session: Session) -> str:
    """Base-model parameters in name order: name, dtype, shape, little-endian bytes of unpadded unsharded rows.

    Every worker calls it; the digest is worker 0's ('' elsewhere).
    """
    dense = {name: p.detach().cpu() for name, p in session.model.named_parameters()}
    digest = hashlib.sha256()
    for name in sorted([*dense, *(f"table.{t}" for t in session.tables.specs)]):
        value = dense[name] if name in dense else session.tables.unsharded(name.removeprefix("table."))
        if value is None:
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().astype(value.numpy().dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest() if session.rank == 0 else ""
