"""A run's best checkpoint, loaded to look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cdr_dist.configuration import TrainConfig
from cdr_dist.errors import UserError
from cdr_dist.training.checkpoint import Checkpoints, newest
from cdr_dist.training.run_folder import RunFolder
from cdr_dist.training.session import Session
from cdr_dist.training.worker import phases_of


def best_step(place: RunFolder) -> int:
    """Of a finished run, or so far."""
    saved = newest(place.checkpoints)
    if saved is None:
        raise UserError(f"{place.uri}: has no checkpoint yet")
    step = saved.progress().best_step
    if step < 0:
        raise UserError(f"{place.uri}: was not validated yet, so no checkpoint is the best")
    return step


@contextmanager
def best_of_run(config: TrainConfig, folder: str, place: RunFolder, step: int, memory: int = 0) -> Iterator[Session]:
    """A session with the parameters of `step`, whatever number of workers wrote it. A collective call.

    config: the run's; folder: of its dataset; memory: as of `Session`. UserError: another dataset, a damaged
    checkpoint.
    """
    torch.set_num_threads(config.trainer.threads)
    session = Session(config, folder, [update for phase in phases_of(config) for update in phase.cycle], memory)
    try:
        checkpoints = Checkpoints(place.checkpoints, session, config.trainer.keep)
        saved = checkpoints.of_step(step)
        checkpoints.check_dataset(saved)
        checkpoints.load_parameters(saved)
        yield session
    finally:
        session.close()
