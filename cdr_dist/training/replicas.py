"""Dense parameters are copies on every worker, kept equal by equal updates: whether they still are."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from cdr_dist.embeddings.workers import max_over_workers, world_size

if TYPE_CHECKING:
    from cdr_dist.training.session import Session


class ReplicasDifferError(RuntimeError):
    """A worker computes something else than the others: a broken machine, or a bug."""


def compare_replicas(session: Session, step: int) -> None:
    """Raises ReplicasDifferError on every worker where the bits of model, perceptron or head differ on any of them."""
    if world_size() == 1:
        return
    modules = [m for m in (session.model, session.perceptron, session.dev_head) if m is not None]
    digest = hashlib.sha256()
    for module in modules:
        for value in module.state_dict().values():
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    bits = torch.tensor([b for b in digest.digest()[:16]], dtype=torch.float32)
    highest = max_over_workers(torch.cat([bits, -bits]))
    if not torch.equal(highest[:16], -highest[16:]):
        raise ReplicasDifferError(
            f"step {step}: dense parameters differ between workers (this one's digest: {digest.hexdigest()[:12]})"
        )
