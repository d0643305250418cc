"""The run folder: configuration, versions, metrics, checkpoints, summary, and the word to stop.

config.yaml  versions.json  metrics.jsonl  checkpoints/  tensorboard/  summary.json
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

from cdr_dist import configuration
from cdr_dist.configuration import TrainConfig
from cdr_dist.errors import UserError

FREE = ("trainer.workers", "trainer.max_steps", "trainer.log_every", "trainer.checkpoint_every", "trainer.keep", "run")
"""What may differ when a run is continued (and max_steps only upwards)."""
FREE_TOO = ("trainer.max_failures", "trainer.verify")
SCORES = "scores_test.parquet"
"""Every row of the test split as the best checkpoint scores it: user, example, label, score."""
COMPLETE = "COMPLETE"
"""The file that a checkpoint ends with."""
_PACKAGES = ("torch", "torchrec", "ray", "pyarrow", "numpy", "polars", "hydra-core")


class RunFolder:
    """Paths and files of one run. One process writes: worker 0, or the driver before workers start."""

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser().absolute()
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self._config = self.path / "config.yaml"
        self._metrics = self.path / "metrics.jsonl"
        self._stop = self.path / "stop"

    def open(self, config: TrainConfig) -> dict[str, Any] | None:
        """Creates the folder, or checks that it holds this very run; the summary where that is finished.

        UserError says what differs. A finished run that is now to take more steps is no longer finished.
        """
        self.check(config)
        if self._config.exists() and self.config().trainer.max_steps != config.trainer.max_steps:
            (self.path / "summary.json").unlink(missing_ok=True)
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self._write(self._config, configuration.to_yaml(config))
        self._write(self.path / "versions.json", json.dumps(versions(), indent=1))
        self._stop.unlink(missing_ok=True)
        return self.summary()

    def is_new(self) -> bool:
        return not self._config.exists()

    def discard_unless_begun(self) -> None:
        """Removes a folder that holds no measurement and no checkpoint: a mended command may then use it."""
        if not self.lines() and not any(self.checkpoints.glob("*")):
            shutil.rmtree(self.path, ignore_errors=True)

    def check(self, config: TrainConfig) -> None:
        """Whether this folder can take the run: empty, not there, or this very run."""
        if "://" in config.run:
            raise UserError(f"run={config.run}: must be a folder that all workers see, not a URI")
        if self._config.exists():
            self._check_same(configuration.from_yaml(self._config.read_text()), config)
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"{self.path}: holds something that is not a run; choose another run=")

    def config(self) -> TrainConfig:
        if not self._config.exists():
            raise UserError(f"{self.path}: not a run (no config.yaml)")
        return configuration.from_yaml(self._config.read_text())

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run."""
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.exists() else None

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._write(self.path / "summary.json", json.dumps(_plain(summary), indent=1))

    def log(self, **values: Any) -> None:
        """Appends one line to metrics.jsonl."""
        try:
            with self._metrics.open("a") as out:
                out.write(json.dumps(_plain(values) | {"time": round(time.time(), 3)}) + "\n")
        except OSError as error:
            raise _unwritable(self._metrics, error) from error

    def forget_after(self, step: int) -> None:
        """Drops the lines that a resume at `step` repeats: later steps, and what came between it and the next one."""
        kept = [line for line in self.lines() if line["step"] + (line["split"] == "upper") <= step]
        self._write(self._metrics, "".join(json.dumps(line) + "\n" for line in kept))

    def lines(self) -> list[dict[str, Any]]:
        return self.lines_after(0)[0]

    def lines_after(self, offset: int) -> tuple[list[dict[str, Any]], int]:
        """The whole lines from byte `offset` on, and the offset to go on from.

        A resume may have cut the file since: then nothing, and its end.
        """
        if not self._metrics.exists():
            return [], 0
        with self._metrics.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(min(offset, size))
            found, end, _ = file.read().rpartition(b"\n")  # the rest is being written, or of a killed run
        return [json.loads(line) for line in found.splitlines()], min(offset, size) + len(found) + len(end)

    def ask_to_stop(self) -> None:
        self._stop.touch()

    def stop_asked(self) -> bool:
        return self._stop.exists()

    def _check_same(self, before: TrainConfig, now: TrainConfig) -> None:
        changed = configuration.differences(before, now, FREE + FREE_TOO)
        # What follows from another option is not worth a screen of it.
        changed = [c for c in changed if not c.startswith("recipe.phases:")] or changed
        old, new = before.trainer.max_steps, now.trainer.max_steps
        if old != new and new != 0 and (old == 0 or new < old):
            changed.append(f"trainer.max_steps: {old} -> {new} (only a larger one may continue a run)")
        if changed:
            shown = "; ".join(changed[:5]) + ("; …" if len(changed) > 5 else "")
            raise UserError(f"{self.path}: holds a run with another configuration: {shown}. Choose another run=")

    @staticmethod
    def _write(path: Path, text: str) -> None:
        """Whole or not at all."""
        part = path.with_name(path.name + ".part")
        try:
            part.write_text(text)
            os.replace(part, path)
        except OSError as error:
            raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be written ({error.strerror or error})")


def _plain(value: Any) -> Any:
    """NaN and infinity are not JSON: null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **found}


def complete(folder: Path) -> list[Path]:
    """The checkpoints in a run's `checkpoints` that were written to their end."""
    return [p for p in folder.glob("step-*") if (p / COMPLETE).exists()]


def steps_done(folder: Path) -> int:
    """Of the newest complete checkpoint; 0 where there is none."""
    return max((int(path.name.removeprefix("step-")) for path in complete(folder)), default=0)
