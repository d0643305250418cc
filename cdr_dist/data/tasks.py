"""One function over many arguments: in this process, or as Ray tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from cdr_dist.data import storage
from cdr_dist.data.options import StorageOptions
from cdr_dist.ray_cluster import connect

A = TypeVar("A")
R = TypeVar("R")


def run_tasks(function: Callable[[A], R], arguments: Sequence[A], workers: int) -> list[R]:
    """Results in the order of the arguments; with `workers`, at most that many tasks at a time.

    What a task raises is raised here as it was, also from a Ray worker.
    """
    if workers == 0:
        return [function(argument) for argument in arguments]
    return _run_on_ray(function, arguments, workers)


def _run_on_ray(function: Callable[[A], R], arguments: Sequence[A], workers: int) -> list[R]:
    import ray
    from ray.exceptions import RayTaskError

    connect(num_cpus=workers, configure_logging=False)
    # Tasks run side by side, so each keeps to one core.
    threads = {"env_vars": {"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1"}}
    task: Any = ray.remote(num_cpus=1, runtime_env=threads)(_with_options)
    results: dict[Any, R] = {}
    order: list[Any] = []
    waiting: list[Any] = []
    try:
        for argument in arguments:
            if len(waiting) == workers:
                done, waiting = ray.wait(waiting)
                results |= {ref: ray.get(ref) for ref in done}
            waiting.append(task.remote(function, storage.options(), argument))
            order.append(waiting[-1])
        return [results[ref] if ref in results else ray.get(ref) for ref in order]
    except RayTaskError as error:
        for ref in waiting:
            ray.cancel(ref)
        raise error.cause from None


def _with_options(function: Callable[[A], R], options: StorageOptions, argument: A) -> R:
    storage.use(options)
    return function(argument)
