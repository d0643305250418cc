"""Copies of a run's numbers for other eyes: MLflow (trainer.mlflow), and Ray's Prometheus metrics where Ray runs.

The run folder has everything; a copy that cannot be made costs a warning, never the run.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from cdr_dist.configuration import TrainConfig, flat
from cdr_dist.data import storage
from cdr_dist.errors import UserError
from cdr_dist.training.run_folder import RunFolder

log = logging.getLogger(__name__)

LOCAL, EXPERIMENT = "local", "cdr_dist"
LONGEST_VALUE = 500
"""Characters of an option's value that MLflow keeps."""
CLOSE_S = 30.0
"""Longest wait, at the end of a run, for a server that does not answer."""


class Mirror(Protocol):
    def write(self, step: int, split: str, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def mirrors_of(config: TrainConfig, folder: RunFolder) -> list[Mirror]:
    """For worker 0."""
    found: list[Mirror] = [MLflow(config, folder)] if config.trainer.mlflow else []
    ray = sys.modules.get("ray")  # who is in a cluster has loaded it; others need not wait for that
    return [*found, RayMetrics(folder.uri)] if ray and ray.is_initialized() else found


def check_mlflow(config: TrainConfig) -> None:
    """UserError: it is wanted and not installed, or has no place."""
    uri = config.trainer.mlflow
    if uri and importlib.util.find_spec("mlflow") is None:
        raise UserError(f"trainer.mlflow={uri}: the package is missing here; pip install mlflow-skinny")
    if uri == LOCAL and not storage.is_local(config.run):
        raise UserError(f"trainer.mlflow={uri}: run={config.run} is on no disk; give a tracking URI")


def _uri(given: str, folder: RunFolder) -> str:
    return f"sqlite:///{Path(folder.uri).absolute().parent}/mlflow.db" if given == LOCAL else given


class RayMetrics:
    """Gauges that Ray exports for Prometheus: ray_cdr_dist_step{run}, ray_cdr_dist_value{run, split, name}."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self._run = run
        self._step = Gauge("cdr_dist_step", "Lower step of a run.", tag_keys=("run",))
        self._value = Gauge("cdr_dist_value", "The newest value of a metric.", tag_keys=("run", "split", "name"))

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        self._step.set(step, tags={"run": self._run})
        for name, value in _finite(values).items():
            self._value.set(value, tags={"run": self._run, "split": split, "name": name})

    def close(self) -> None:
        pass


class MLflow:
    """A run of the experiment EXPERIMENT, named after the run folder; a resumed one goes on.

    A thread of its own talks to the server, so that training waits for no answer.
    """

    def __init__(self, config: TrainConfig, folder: RunFolder) -> None:
        self._folder, self._given = folder, config.trainer.mlflow or LOCAL
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._client: Any = None
        self._run = ""
        self._thread = threading.Thread(target=self._work, daemon=True, name="cdr-mlflow")
        self._todo.put(lambda: self._begin(config))
        self._thread.start()

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        kept = _finite(values)
        self._todo.put(lambda: self._log(step, split, kept))

    def close(self) -> None:
        self._todo.put(lambda: self._client.set_terminated(self._run))
        self._todo.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.warning("trainer.mlflow=%s: gives no answer; the run folder has everything", self._given)

    def _work(self) -> None:
        try:
            while (do := self._todo.get()) is not None:
                do()
        except Exception as error:  # a server's, a network's, a database's
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            log.warning("trainer.mlflow=%s: no more is written there (%s)", self._given, reason)

    def _begin(self, config: TrainConfig) -> None:
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        self._client = MlflowClient(_uri(self._given, self._folder))
        found = self._client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else self._client.create_experiment(EXPERIMENT)
        before = self._client.search_runs([experiment], f"tags.run = '{self._folder.uri}'", max_results=1)
        if before:
            self._run = before[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        name = self._folder.uri.rstrip("/").rpartition("/")[2]
        self._run = self._client.create_run(experiment, run_name=name, tags={"run": self._folder.uri}).info.run_id
        for option, value in flat(config).items():
            if not option.startswith("recipe.phases"):
                self._client.log_param(self._run, option, str(value)[:LONGEST_VALUE])

    def _log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, f"{split}/{name.replace('@', '_at_')}", value, step=step)


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(v) for name, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
