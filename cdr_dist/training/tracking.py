"""What worker 0 writes while it trains: metrics.jsonl, TensorBoard, and copies for others (`mirrors.py`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch.utils.tensorboard import SummaryWriter

from cdr_dist.training.mirrors import Mirror
from cdr_dist.training.run_folder import RunFolder


class Recorder:
    """The loop's watcher on worker 0. Losses are means since the last line, of one phase."""

    def __init__(self, folder: RunFolder, log_every: int, mirrors: Sequence[Mirror] = ()) -> None:
        self._folder, self._log_every, self._mirrors = folder, log_every, mirrors
        self._sums: dict[str, float] = defaultdict(float)
        self._count, self._phase = 0, ""
        self._files = folder.board()
        self._board = SummaryWriter(str(self._files))

    def started(self, rows: dict[str, int]) -> None:
        """Table -> rows that start from an earlier run or from given vectors."""
        self._folder.log(step=0, phase="", split="start", values=rows)

    def trained(self, step: int, phase: str, values: dict[str, float]) -> None:
        if phase != self._phase:
            self._sums.clear()
            self._count, self._phase = 0, phase
        for name, value in values.items():
            self._sums[name] += value
        self._count += 1
        if step % self._log_every == 0:
            self._write(step, phase, "train", {n: v / self._count for n, v in self._sums.items()})
            self._sums.clear()
            self._count = 0

    def updated(self, step: int, phase: str, values: dict[str, float]) -> None:
        self._write(step, phase, "upper", values)

    def validated(self, step: int, phase: str, values: dict[str, float]) -> None:
        self._write(step, phase, "valid", values)
        self._publish()

    def close(self) -> None:
        self._board.close()
        self._publish()
        for mirror in self._mirrors:
            mirror.close()

    def _publish(self) -> None:
        self._board.flush()
        self._folder.flush()
        self._folder.publish_board(self._files)

    def _write(self, step: int, phase: str, split: str, values: dict[str, float]) -> None:
        self._folder.log(step=step, phase=phase, split=split, values=values)
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, step)
        for mirror in self._mirrors:
            mirror.write(step, split, values)


class Silent:
    """The watcher of the other workers."""

    def started(self, rows: dict[str, int]) -> None:
        pass

    def trained(self, step: int, phase: str, values: dict[str, float]) -> None:
        pass

    def updated(self, step: int, phase: str, values: dict[str, float]) -> None:
        pass

    def validated(self, step: int, phase: str, values: dict[str, float]) -> None:
        pass
