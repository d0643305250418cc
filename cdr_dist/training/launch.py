"""Starts a run: in this process (trainer.workers=0) or on Ray Train workers, and watches it."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cdr_dist.configuration import TrainConfig, from_yaml, to_yaml
from cdr_dist.data import storage
from cdr_dist.data.dataset import read_manifest
from cdr_dist.errors import STOPPED, Stopped, UserError
from cdr_dist.ray_cluster import connect
from cdr_dist.training.checkpoint import newest
from cdr_dist.training.checks import check_before_start, most_steps
from cdr_dist.training.console import Console
from cdr_dist.training.lease import Lease
from cdr_dist.training.memory import check_memory, check_memory_of_cluster
from cdr_dist.training.run_folder import REPORT, RunFolder
from cdr_dist.training.start import check_start


def train(config: TrainConfig, folder: str, quiet: bool = False) -> dict[str, Any]:
    """Trains, or continues the run in `config.run`, and returns its summary. Raises UserError, Stopped."""
    quiet_libraries()
    manifest = check_before_start(config, folder)
    place = RunFolder(config.run)
    place.check(config)
    if newest(place.checkpoints) is None:
        check_start(config, folder, manifest)
    done = place.summary()
    if done is not None and place.config().trainer.max_steps == config.trainer.max_steps:
        return done
    check_memory(config, manifest)
    with Lease(place.uri) as lease:
        result, told = _train(config, folder, place, lease, most_steps(config, manifest), quiet)
    if result == STOPPED:
        raise Stopped(f"{place.uri}: stopped; the same command continues", *told[:1])
    summary = place.summary()
    assert summary is not None
    if config.trainer.report and not storage.exists(
        place.file(REPORT)
    ):  # the reason went to the screen of worker 0, which may be far away
        print(f"{place.uri}: has no {REPORT}; python jobs/report.py run={place.uri}", file=sys.stderr, flush=True)
    return summary


def _train(
    config: TrainConfig, folder: str, place: RunFolder, lease: Lease, steps: int, quiet: bool
) -> tuple[Any, list[int]]:
    """What worker 0 returned, and the signals that came."""
    new = place.is_new()
    place.open(config)
    saved = newest(place.checkpoints)
    title = f"{config.recipe.name} seed {config.seed}"
    with Console(place, title, steps, saved.step if saved else 0, quiet):
        start = _in_process if config.trainer.workers == 0 else _on_ray
        told: list[int] = []
        try:
            return start(_with_absolute_paths(config), storage.absolute(folder), place, lease.token, told), told
        except UserError:
            if new:
                lease.hold_still()
                place.discard_unless_begun()
            raise


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    start = {table: storage.absolute(path) for table, path in config.tables.start.items()}
    earlier = config.warm_start.run
    return dataclasses.replace(
        config,
        tables=dataclasses.replace(config.tables, start=start),
        warm_start=dataclasses.replace(config.warm_start, run=storage.absolute(earlier) if earlier else None),
    )


@contextmanager
def alone() -> Iterator[None]:
    """This process as the only worker."""
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def stopped_by_signals(place: RunFolder, told: list[int]) -> Iterator[None]:
    """SIGTERM and Ctrl-C ask the run to stop after its step; Ctrl-C again ends it at once. told: gets the signal."""

    def ask(number: int, _: Any) -> None:
        told.append(number)
        place.ask_to_stop()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            print("stopping after this step; Ctrl-C again ends it at once", file=sys.stderr, flush=True)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_process(config: TrainConfig, folder: str, place: RunFolder, token: str, told: list[int]) -> Any:
    from cdr_dist.training.worker import work  # loads TorchRec, which a driver of Ray workers does not need

    with stopped_by_signals(place, told), alone():
        return work(config, folder, place.uri, token)


def _on_ray(config: TrainConfig, folder: str, place: RunFolder, token: str, told: list[int]) -> Any:
    """Starts again where workers were lost. Not left to Ray Train, which starts again on a user's mistake, too."""
    from ray.train import TrainingFailedError

    lost = 0
    given = {"config": to_yaml(config), "folder": folder, "run": place.uri, "token": token}
    with cluster(config.trainer.workers), stopped_by_signals(place, told):  # in this order: Ray sets its own
        check_memory_of_cluster(config, read_manifest(folder))
        while True:
            try:
                return fit(config, place, ray_worker, given)
            except TrainingFailedError as error:
                if lost == config.trainer.max_failures:
                    raise
                lost += 1
                print(_lost(error, lost, config.trainer.max_failures), file=sys.stderr, flush=True)


def with_workers(config: TrainConfig, workers: int | None) -> TrainConfig:
    """A finished run's configuration for so many workers (None: as many as trained it) that only read it.

    UserError: more than it has lanes.
    """
    wanted = config.trainer.workers if workers is None else workers
    if wanted > config.stream.lanes:
        raise UserError(f"workers={wanted}: more than stream.lanes={config.stream.lanes}, as many as a run has")
    trainer = dataclasses.replace(config.trainer, workers=wanted, checkpoint="in_place")
    return dataclasses.replace(config, trainer=trainer)


def on_workers(
    config: TrainConfig, place: RunFolder, function: Callable[[dict[str, Any]], Any], given: dict[str, Any]
) -> Any:
    """What function(given) returns on worker 0 of trainer.workers workers, or in this process where there are none."""
    if config.trainer.workers == 0:
        with alone():
            return function(given)
    with cluster(config.trainer.workers):
        return fit(config, place, function, given)


def fit(config: TrainConfig, place: RunFolder, function: Callable[[dict[str, Any]], Any], given: dict[str, Any]) -> Any:
    """What function(given) returns on worker 0 of trainer.workers workers of Ray Train.

    UserError: what any of them raised. TrainingFailedError: anything else went wrong, on any of them.
    """
    from ray.train import TrainingFailedError

    try:
        return _trainer(config, place, function, given).fit().return_value
    except TrainingFailedError as error:
        mistake = users_mistake(error)
        if mistake is not None:
            raise UserError(mistake) from error
        raise


def _trainer(config: TrainConfig, place: RunFolder, function: Callable[..., Any], given: dict[str, Any]) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            """Ray Train's would abort the run on Ctrl-C; `stopped_by_signals` lets it finish its step."""

    cuda = config.trainer.device == "cuda"
    ray_path, ray_files = place.file("ray"), None
    if not place.local:  # through the same client, which finds endpoint and credentials as everything else does
        store, ray_path = storage.locate(ray_path)
        ray_files = store.arrow()
    return Trainer(
        function,
        train_loop_config=given,
        scaling_config=ScalingConfig(num_workers=config.trainer.workers, use_gpu=cuda),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if cuda else "gloo", timeout_s=config.trainer.hang_s),
        run_config=RunConfig(
            # A name of its own for every start: Ray Train resumes its own state of an equal name, and ours is
            # the run folder's.
            name=f"{Path(place.uri).name}-{os.getpid()}-{os.urandom(3).hex()}",
            storage_path=ray_path,
            storage_filesystem=ray_files,
            failure_config=FailureConfig(max_failures=0),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )


def _lost(error: Exception, lost: int, most: int) -> str:
    failures = getattr(error, "worker_failures", {})
    who = ", ".join(f"worker {rank} ({type(e).__name__})" for rank, e in sorted(failures.items())) or "the workers"
    return f"lost {who}; starting again from the newest checkpoint ({lost} of {most} times)"


def ray_worker(given: dict[str, str]) -> Any:
    """What Ray Train calls on every worker."""
    from cdr_dist.training.worker import work

    quiet_libraries()
    return work(from_yaml(given["config"]), given["folder"], given["run"], given["token"])


@contextmanager
def cluster(workers: int) -> Iterator[None]:
    """The cluster of RAY_ADDRESS, or a local one that ends with the block. Within such a block: that block's."""
    import ray

    if workers == 0 or ray.is_initialized():
        yield
        return
    if not os.environ.get("RAY_ADDRESS"):
        print(f"starting a local Ray for {workers} workers, about half a minute", file=sys.stderr, flush=True)
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # one more process, for cloud nodes
    connect(num_cpus=max(workers + 1, os.cpu_count() or 1))  # the controller takes a share, too
    try:
        yield
    finally:
        ray.shutdown()


def users_mistake(error: BaseException) -> str | None:
    """The message of a UserError that a worker raised, through Ray's wrappings; None where there is none."""
    seen: set[int] = set()
    todo: list[BaseException] = [error]
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, UserError):
            return str(one)
        todo += [
            e for e in (one.__cause__, one.__context__, getattr(one, "cause", None)) if isinstance(e, BaseException)
        ]
        todo += [e for e in getattr(one, "worker_failures", {}).values() if isinstance(e, BaseException)]
    return None


def quiet_libraries() -> None:
    """TorchRec's planner and FBGEMM warn at length about plans that we fix on purpose."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torchrec|fbgemm_gpu|torch")
    for name in ("torchrec", "torchrec.distributed", "torch.fx", "fbgemm_gpu", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
