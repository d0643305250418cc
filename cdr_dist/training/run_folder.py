"""The run folder, local or in an object store: configuration, versions, metrics, checkpoints, summary, word to stop.

config.yaml  versions.json  metrics.jsonl  checkpoints/  tensorboard/  summary.json  report.html  lease.json
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from cdr_dist import configuration
from cdr_dist.configuration import TrainConfig
from cdr_dist.crash_points import durable
from cdr_dist.data import storage
from cdr_dist.errors import UserError
from cdr_dist.training.lease import FILE as LEASE

FREE = ("trainer.workers", "trainer.max_steps", "trainer.log_every", "trainer.checkpoint_every", "trainer.keep", "run")
"""What may differ when a run is continued (and max_steps only upwards)."""
FREE_TOO = tuple(
    f"trainer.{name}" for name in ("max_failures", "verify", "checkpoint", "hang_s", "compare_every", "report")
)
FREE_ALSO = ("trainer.mlflow", "trainer.shared_memory", "trainer.memory_gb", "batch.accumulate", "storage.")
SCORES = "scores_test.parquet"
"""Every row of the test split as the best checkpoint scores it: user, example, label, score."""
METRICS, SUMMARY, CONFIG, STOP = "metrics.jsonl", "summary.json", "config.yaml", "stop"
REPORT = "report.html"
"""What a finished run came to, for people; no job reads it."""
WEIGHTS, HISTOGRAM, BY_LENGTH = "weights.parquet", "weights_histogram.parquet", "weights_by_length.parquet"
"""With a perceptron: what `learned_weights` found."""
FLUSH_S = 5.0
"""Object stores have no appending: metrics.jsonl is written anew, at most this often."""
_PACKAGES = ("torch", "torchrec", "ray", "pyarrow", "numpy", "polars", "hydra-core")


class RunFolder:
    """Files of one run. One process writes: worker 0, or the driver before workers start."""

    def __init__(self, uri: str) -> None:
        self.local = storage.is_local(uri)
        self.uri = storage.absolute(uri)
        self.checkpoints = self.file("checkpoints")
        self._lines: list[str] = []
        """Of an object store's metrics.jsonl, as far as this process knows it."""
        self._flushed = 0.0

    def file(self, name: str) -> str:
        return storage.join(self.uri, name)

    def open(self, config: TrainConfig) -> dict[str, Any] | None:
        """Creates the folder, or checks that it holds this very run; the summary where that is finished.

        UserError says what differs. A finished run that is now to take more steps is no longer finished.
        """
        self.check(config)
        for name in storage.names(self.uri):
            if name.startswith(".") and name.endswith(".part"):  # of a writer that was killed
                with durable("run.sweep"):
                    storage.remove_file(self.file(name))
        if not self.is_new() and self.config().trainer.max_steps != config.trainer.max_steps:
            with durable("run.go_on"):
                storage.remove_file(self.file(SUMMARY))
                storage.remove_file(self.file(REPORT))
        with durable("run.config"):
            storage.write_bytes(self.file(CONFIG), configuration.to_yaml(config).encode())
        with durable("run.versions"):
            storage.write_bytes(self.file("versions.json"), json.dumps(versions(), indent=1).encode())
        with durable("run.unstop"):
            storage.remove_file(self.file(STOP))
        return self.summary()

    def is_new(self) -> bool:
        return not storage.exists(self.file(CONFIG))

    def discard_unless_begun(self) -> None:
        """Removes a folder that holds no measurement and no checkpoint: a mended command may then use it."""
        if not self.lines() and not storage.names(self.checkpoints):
            with durable("run.discard"):
                storage.remove_folder(self.uri)

    def check(self, config: TrainConfig) -> None:
        """Whether this folder can take the run: empty, not there, or this very run."""
        if not self.is_new():
            self._check_same(self.config(), config)
        elif (storage.exists(self.uri) and not storage.is_folder(self.uri)) or self._foreign():
            raise UserError(f"{self.uri}: holds something that is not a run; choose another run=")

    def _foreign(self) -> list[str]:
        """What stands in a folder before its run begins, but for what a crash then leaves: a lease, halves of files."""
        return [name for name in storage.names(self.uri) if name != LEASE and not name.startswith(".")]

    def config(self) -> TrainConfig:
        if self.is_new():
            raise UserError(f"{self.uri}: not a run (no {CONFIG})")
        content = storage.read_bytes(self.file(CONFIG))
        try:
            return configuration.from_yaml(content.decode())
        except Exception as error:  # of YAML, of OmegaConf, of our options
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{self.file(CONFIG)}: damaged, or of another version ({reason}); choose another run="
            ) from error

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run. UserError: damaged."""
        uri = self.file(SUMMARY)
        if not storage.exists(uri):
            return None
        found = _object(storage.read_bytes(uri))
        if found is None or not found.keys() >= _SUMMED_UP:
            raise UserError(f"{uri}: damaged; delete it, and the same command measures the run's best checkpoint again")
        return found

    def write_summary(self, summary: dict[str, Any]) -> None:
        with durable("run.summary"):
            storage.write_bytes(self.file(SUMMARY), json.dumps(_plain(summary), indent=1).encode())

    def log(self, **values: Any) -> None:
        """Appends one line to metrics.jsonl; to one in an object store with the next `flush`."""
        line = json.dumps(_plain(values) | {"time": round(time.time(), 6)}) + "\n"
        if not self.local:
            self._lines.append(line)
            if time.monotonic() - self._flushed > FLUSH_S:
                self.flush()
            return
        try:
            with durable("run.line"), Path(self.file(METRICS)).open("a") as out:
                out.write(line)
        except OSError as error:
            raise UserError(f"{self.file(METRICS)}: cannot be written ({error.strerror or error})") from error

    def flush(self) -> None:
        if not self.local:
            with durable("run.lines"):
                storage.write_bytes(self.file(METRICS), "".join(self._lines).encode())
            self._flushed = time.monotonic()

    def forget_after(self, step: int) -> None:
        """Drops the lines that a resume at `step` repeats: later steps, and what came between it and the next one."""
        kept = [line for line in self.lines() if line["step"] + (line["split"] == "upper") <= step]
        self._lines = [json.dumps(line) + "\n" for line in kept]
        with durable("run.forget"):
            storage.write_bytes(self.file(METRICS), "".join(self._lines).encode())

    def lines(self) -> list[dict[str, Any]]:
        return self.lines_after(0)[0]

    def lines_after(self, offset: int) -> tuple[list[dict[str, Any]], int]:
        """The whole lines from byte `offset` on, and the offset to go on from.

        Where `offset` is no longer the start of a line (a resume has rewritten the file), all lines. A last line that
        a loss of power has torn does not count. UserError: another one is damaged.
        """
        uri = self.file(METRICS)
        if not storage.exists(uri):
            return [], 0
        size = storage.size(uri)
        before = storage.read_range(uri, offset - 1, size) if 0 < offset <= size else b""
        if not before.startswith(b"\n"):
            offset, before = 0, b"\n" + storage.read_range(uri, 0, size)
        found, end, _ = before[1:].rpartition(b"\n")  # the rest is being written, or of a killed run
        lines = [_line(text) for text in found.split(b"\n")] if end else []
        if lines and lines[-1] is None:
            lines.pop()
        if None in lines:
            number = storage.read_bytes(uri)[:offset].count(b"\n") + lines.index(None) + 1
            raise UserError(f"{uri}: line {number} is damaged; delete that line to continue the run")
        return [line for line in lines if line is not None], offset + len(found) + len(end)

    def board(self) -> Path:
        """Where TensorBoard's files are written; `publish_board` brings them to an object store."""
        return Path(self.file("tensorboard")) if self.local else Path(tempfile.mkdtemp(prefix="tensorboard-"))

    def publish_board(self, board: Path) -> None:
        if not self.local:
            for path in board.iterdir():
                with durable("run.board"):
                    storage.write_bytes(self.file(f"tensorboard/{path.name}"), path.read_bytes())

    def ask_to_stop(self) -> None:
        with durable("run.stop"):
            storage.write_bytes(self.file(STOP), b"")

    def stop_asked(self) -> bool:
        return storage.exists(self.file(STOP))

    def _check_same(self, before: TrainConfig, now: TrainConfig) -> None:
        changed = configuration.differences(before, now, FREE + FREE_TOO + FREE_ALSO)
        # What follows from another option is not worth a screen of it.
        changed = [c for c in changed if not c.startswith("recipe.phases:")] or changed
        old, new = before.trainer.max_steps, now.trainer.max_steps
        if old != new and new != 0 and (old == 0 or new < old):
            changed.append(f"trainer.max_steps: {old} -> {new} (only a larger one may continue a run)")
        if changed:
            shown = "; ".join(changed[:5]) + ("; …" if len(changed) > 5 else "")
            raise UserError(f"{self.uri}: holds a run with another configuration: {shown}. Choose another run=")


_OF_A_LINE: dict[str, Any] = {"step": int, "split": str, "values": dict, "time": (int, float)}
_SUMMED_UP = {"recipe", "steps", "best", "metrics", "throughput", "parameters_sha256"}


def _object(text: bytes) -> dict[str, Any] | None:
    """None: not a JSON object."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _line(text: bytes) -> dict[str, Any] | None:
    """One of metrics.jsonl. None: damaged."""
    found = _object(text)
    whole = found is not None and all(isinstance(found.get(name), kind) for name, kind in _OF_A_LINE.items())
    return found if whole else None


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
