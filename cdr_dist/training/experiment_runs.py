"""Many runs, as many at once as fit: in processes of this machine, or as tasks of a Ray cluster.

A run that fails does not end the others: what became of each is an `Outcome`.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

from cdr_dist.configuration import TrainConfig
from cdr_dist.data import storage
from cdr_dist.data.dataset import Manifest, read_manifest
from cdr_dist.data.demo import dataset_of
from cdr_dist.data.retries import redacted
from cdr_dist.errors import Stopped, UserError
from cdr_dist.ray_cluster import connect
from cdr_dist.training.experiment import Plan
from cdr_dist.training.memory import GIB, free_bytes, need

log = logging.getLogger(__name__)

_CONTEXT: Any = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Ended:
    """What a run came to: a summary, or one line that says why there is none."""

    summary: dict[str, Any] | None = None
    failure: str = ""
    mistake: bool = False
    """Whether the failure is one that the user can mend."""


@dataclass(frozen=True)
class Outcome:
    plan: Plan
    ended: Ended

    @property
    def summary(self) -> dict[str, Any] | None:
        """With the names that the experiment knows the run's data, model and method by."""
        if self.ended.summary is None:
            return None
        data, model, method = self.plan.cell
        before = self.ended.summary
        return before | {"data": (before.get("data") or {}) | {"name": data}, "model": model, "recipe": method}


class Room(NamedTuple):
    """What a run takes, or what there is: cores, bytes of main memory, and GPUs (0: nobody counts them)."""

    cores: int
    memory: int
    gpus: int = 0


class Places(Protocol):
    """Where runs take place."""

    def room(self) -> Room:
        """What all runs together may take."""

    def start(self, number: int, words: list[str]) -> None:
        """Begins run `number`."""

    def next(self) -> tuple[int, Ended]:
        """Waits for one of those that were started."""

    def close(self) -> None:
        """Asks what still runs to stop, which leaves checkpoints to continue from."""


Run = Callable[[list[str]], Ended]


def run_all(todo: Sequence[Plan], places: Places, at_once: int, quiet: bool = False) -> list[Outcome]:
    """Trains every plan, `at_once` at a time and after what it starts from; finished ones are read. In plans' order."""
    ended: dict[int, Ended] = {}
    number_of = {plan.run: number for number, plan in enumerate(todo)}
    waiting = list(range(len(todo)))
    with tqdm(total=len(todo), unit="run", disable=quiet) as bar:

        def end(number: int, result: Ended) -> None:
            plan, ended[number] = todo[number], result
            bar.set_postfix_str(_told(plan, result))
            bar.update()
            if result.failure:
                bar.write(f"failed: {plan}: {result.failure}", file=sys.stderr)

        running = 0
        while waiting or running:
            for number in list(waiting):
                start = number_of.get(todo[number].start)
                if start is not None and start not in ended:
                    continue
                if start is not None and ended[start].summary is None:
                    waiting.remove(number)
                    end(number, Ended(None, f"starts from {todo[start]}, which failed", ended[start].mistake))
                elif running < at_once:
                    waiting.remove(number)
                    places.start(number, todo[number].words)
                    running += 1
            if running:
                number, result = places.next()
                running -= 1
                end(number, _found(todo[number], result))
    return [Outcome(plan, ended[number]) for number, plan in enumerate(todo)]


def _found(plan: Plan, ended: Ended) -> Ended:
    """A run that went well on another machine, in a folder that only that one has, is of no use here."""
    if ended.summary is None or storage.exists(plan.run):
        return ended
    return Ended(
        None,
        f"{plan.run} is not here: on a cluster runs= (or out=) is a folder that all machines share, or s3://",
        True,
    )


def _told(plan: Plan, ended: Ended) -> str:
    if ended.summary is None:
        return f"{plan} failed"
    best = ended.summary["best"]
    return f"{plan} valid {best['metric']} {best['value']:.4f}"


def run_one(words: list[str]) -> Ended:
    """Trains. Everything that goes wrong becomes a line, because the other runs go on."""
    from cdr_dist.configuration import from_words
    from cdr_dist.training.launch import train

    try:
        config = from_words(words)
        return Ended(train(config, dataset_of(config.data), quiet=True))
    except UserError as error:
        return Ended(None, _line(str(error)), True)
    except Stopped:
        return Ended(None, "stopped; the same command continues")
    except Exception as error:
        print(redacted(traceback.format_exc()), end="", file=sys.stderr)
        return Ended(None, _line(redacted(f"{type(error).__name__}: {error}")))


def _line(text: str) -> str:
    return " ".join(text.split())[:300]


def check_parallel(given: str) -> None:
    """UserError: neither auto nor a number of runs."""
    if given != "auto" and not (given.isascii() and given.isdigit() and int(given)):
        raise UserError(f"parallel={given}: must be auto or a whole number, at least 1")


def parallel_of(given: str, configs: Sequence[TrainConfig], there: Room) -> int:
    """`parallel=`: a number, or auto: as many as there are cores and memory for, of the largest run."""
    if given != "auto":
        return int(given)
    largest = largest_of(configs)
    fit = [there.cores // largest.cores, there.memory // largest.memory]
    if largest.gpus and there.gpus:
        fit.append(there.gpus // largest.gpus)
    return max(1, min(fit))


def largest_of(configs: Sequence[TrainConfig]) -> Room:
    """With all workers of a run. Each may be that of another run."""
    manifests: dict[str, Manifest] = {}
    cores, memory, gpus = 1, GIB, 0
    for config in configs:
        workers = max(config.trainer.workers, 1)
        if config.data not in manifests:
            manifests[config.data] = read_manifest(dataset_of(config.data))
        cores = max(cores, config.trainer.threads * workers)
        memory = max(memory, need(config, manifests[config.data]).host * workers)
        gpus = max(gpus, workers * (config.trainer.device == "cuda"))
    return Room(cores, memory, gpus)


def places_of(configs: Sequence[TrainConfig], parallel: str = "auto") -> Places:
    """Ray where RAY_ADDRESS names a cluster, otherwise this machine. parallel: as given; more runs than GPUs share
    these."""
    if not os.environ.get("RAY_ADDRESS"):
        return Processes()
    own = [config for config in configs if config.trainer.workers == 0]
    # nothing for the task itself where the run's own workers have their share
    return RayTasks(largest_of(own) if own else Room(0, 0), 0 if parallel == "auto" else int(parallel))


class Processes:
    """Processes of this machine, each for one run after another. A killed one takes only its own run along."""

    def __init__(self, run: Run = run_one) -> None:
        self._run = run
        self._idle: list[_Process] = []
        self._busy: dict[Connection, tuple[int, _Process]] = {}

    def room(self) -> Room:
        return Room(len(os.sched_getaffinity(0)), free_bytes())

    def start(self, number: int, words: list[str]) -> None:
        process = self._idle.pop() if self._idle else _Process(self._run)
        process.line.send(words)
        self._busy[process.line] = number, process

    def next(self) -> tuple[int, Ended]:
        line = wait(list(self._busy))[0]
        number, process = self._busy.pop(line)  # type: ignore[call-overload]
        try:
            ended: Ended = process.line.recv()
        except (EOFError, ConnectionError):
            return number, Ended(None, process.epitaph())
        self._idle.append(process)
        return number, ended

    def close(self) -> None:
        for _, process in self._busy.values():
            process.stop()
        for process in [*self._idle, *(process for _, process in self._busy.values())]:
            process.join()
        self._idle, self._busy = [], {}


class _Process:
    """A child that answers words with `Ended` until its line is closed, also by our death."""

    def __init__(self, run: Run) -> None:
        self.line, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(theirs, run))
        self._process.start()
        theirs.close()

    def epitaph(self) -> str:
        self._process.join()
        code = self._process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"its process {how}" + ("; out of memory?" if code == -signal.SIGKILL else "")

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            self._process.terminate()  # a run then ends after its step, with a checkpoint

    def join(self) -> None:
        self.line.close()
        self._process.join()


def _serve(line: Connection, run: Run) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches our parent, too, which asks us to stop
    with suppress(EOFError, ConnectionError):
        while True:
            line.send(run(line.recv()))


class RayTasks:
    """Tasks of the cluster at RAY_ADDRESS. at_once: how many share its GPUs where there are fewer; 0: nobody does."""

    def __init__(self, task: Room, at_once: int = 0, run: Run = run_one) -> None:
        import ray

        connect()
        threads = {"env_vars": {"OMP_NUM_THREADS": "1"}}
        there = self.room().gpus
        if task.gpus and not there:
            log.warning("trainer.device=cuda: the cluster has no GPU yet; runs wait for one")
        gpus = task.gpus if at_once * task.gpus <= there else task.gpus * max(there, 1) / at_once
        needs: dict[str, Any] = {"num_cpus": task.cores, "memory": task.memory or None, "num_gpus": gpus}
        self._task: Any = ray.remote(**needs, max_retries=0, runtime_env=threads)(run)
        self._running: dict[Any, int] = {}

    def room(self) -> Room:
        import ray

        of = ray.cluster_resources()
        return Room(max(1, int(of.get("CPU", 1))), int(of.get("memory", 0)), int(of.get("GPU", 0)))

    def start(self, number: int, words: list[str]) -> None:
        self._running[self._task.remote(words)] = number

    def next(self) -> tuple[int, Ended]:
        import ray
        from ray.exceptions import RayError

        ready = ray.wait(list(self._running))[0][0]
        number = self._running.pop(ready)
        try:
            return number, ray.get(ready)
        except RayError as error:  # what run_one raises, it catches: a lost process or machine
            return number, Ended(None, _line(f"its process was lost ({type(error).__name__})"))

    def close(self) -> None:
        import ray

        for task in self._running:
            ray.cancel(task)
        ray.shutdown()
