"""A run's best checkpoint, loaded to look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cdr_dist.configuration import TrainConfig
from cdr_dist.errors import UserError
from cdr_dist.training.checkpoint import Checkpoints
from cdr_dist.training.run_folder import RunFolder
from cdr_dist.training.session import Session
from cdr_dist.training.warm_start import warm_start
from cdr_dist.training.worker import phases_of


def check_knows_targets(config: TrainConfig, place: RunFolder) -> None:
    """UserError: a run of source sequences alone, which scores no target item."""
    if not config.recipe.target:
        raise UserError(
            f"{place.uri}: recipe={config.recipe.name} knows no target items; fine-tune it first: "
            f"python jobs/train.py recipe=uaf_hard model=nextitnet warm_start.run={place.uri} …"
        )


@contextmanager
def best_of_run(
    config: TrainConfig, folder: str, place: RunFolder, step: int, memory: int = 0, grown: bool = False
) -> Iterator[Session]:
    """A session with the parameters of `step`, whatever number of workers wrote it. A collective call.

    config: the run's; folder: of its dataset, or of one that this was extended to (grown, which `start.check_fits` has
    looked at); memory: as of `Session`. UserError: another dataset, a damaged checkpoint.
    """
    torch.set_num_threads(config.trainer.threads)
    session = Session(config, folder, [update for phase in phases_of(config) for update in phase.cycle], memory)
    try:
        if grown:
            warm_start(session, place, whole=True)
        else:
            checkpoints = Checkpoints(place.checkpoints, session, config.trainer.keep)
            saved = checkpoints.of_step(step)
            checkpoints.check_dataset(saved)
            checkpoints.load_parameters(saved)
        yield session
    finally:
        session.close()
