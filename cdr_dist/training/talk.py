"""What workers say to one another about a checkpoint: any picklable value, apart from the messages of training."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, Protocol

import torch.distributed as dist

from cdr_dist.embeddings.workers import world_size
from cdr_dist.errors import UserError


class Talk(Protocol):
    """Every worker calls every method, in the same order."""

    def broadcast(self, value: Any) -> Any:
        """Worker 0's value."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The values of all workers, by rank."""
        ...


class OverGroup:
    """Over torch.distributed. own: a group that nothing else uses, for a thread that talks while training does."""

    def __init__(self, own: bool = False, patience_s: int = 600) -> None:
        patience = datetime.timedelta(seconds=patience_s)
        self._group = dist.new_group(backend="gloo", timeout=patience) if own and world_size() > 1 else None

    def broadcast(self, value: Any) -> Any:
        if world_size() == 1:
            return value
        found = [value]
        dist.broadcast_object_list(found, group=self._group)
        return found[0]

    def gather(self, value: Any) -> list[Any]:
        if world_size() == 1:
            return [value]
        found: list[Any] = [None] * world_size()
        dist.all_gather_object(found, value, group=self._group)
        return found


def agreed(talk: Talk, find: Callable[[], Any], rank: int) -> Any:
    """What worker 0 finds; its UserError is everybody's."""
    found = None
    if rank == 0:
        try:
            found = find()
        except UserError as error:
            found = error
    found = talk.broadcast(found)
    if isinstance(found, UserError):
        raise found
    return found
