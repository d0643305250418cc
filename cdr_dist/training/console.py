"""What the driver shows of a run while it trains."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import Any

from tqdm import tqdm

from cdr_dist import logs
from cdr_dist.errors import UserError
from cdr_dist.evaluation.classification import METRICS as CLASS_METRICS
from cdr_dist.evaluation.metrics import FULL
from cdr_dist.training.run_folder import RunFolder

VALIDATION, LOSSES = ("auc", "gauc", "logloss", *CLASS_METRICS, "nll"), ("target_loss", "source_loss", "nll")
"""What is shown of a line of metrics.jsonl, where it has it."""


class Console:
    """Follows metrics.jsonl in a thread: a progress bar on a terminal, plain lines elsewhere.

    steps: the most there can be; done: those of an earlier start.
    """

    def __init__(self, folder: RunFolder, title: str, steps: int, done: int = 0, quiet: bool = False) -> None:
        self._folder, self._title, self._quiet = folder, title, quiet
        old, self._seen = folder.lines_after(0)
        self._latest = max((line["time"] for line in old), default=0.0)
        self._growing = 0
        self._done = threading.Event()
        shown = sys.stderr.isatty() and not quiet
        self._bar = tqdm(total=steps, initial=done, desc=title, unit="step") if shown else None
        self._thread = threading.Thread(target=self._follow, daemon=True, name="cdr-console")

    def __enter__(self) -> Console:
        if not self._quiet:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if not self._quiet:
            self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def _follow(self) -> None:
        while True:
            last = self._done.wait(0.5)
            with contextlib.suppress(UserError):  # a resume may be rewriting the file: the next look finds it
                lines, self._seen = self._folder.lines_after(self._seen)
                for line in lines:
                    if line["time"] > self._latest:  # a rewritten file is read again
                        self._show(line)
                self._latest = max([self._latest, *(line["time"] for line in lines)])
            if last:
                return

    def _show(self, line: dict[str, Any]) -> None:
        if "split" not in line:
            return
        values, step = line["values"], line["step"]
        if line["split"] == "upper":
            self._warn_of_growth(step, values)
            return
        if line["split"] == "start":
            for table, rows in values.items():
                self._say(step, f"{rows} rows of table {table} start from an earlier run or from given vectors")
            return
        keys: list[str] = [*VALIDATION, *(k for k in values if k.startswith(FULL))]
        keys = keys if line["split"] == "valid" else [*LOSSES]
        text = "  ".join(f"{k} {values[k]:.4f}" for k in keys if values.get(k) is not None)
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_postfix_str(text)
        if self._bar is None or line["split"] == "valid":
            self._say(step, f"{line['split']}  {text}", split=line["split"], values=values)

    def _say(self, step: int, text: str, **more: Any) -> None:
        text = f"{self._title}  step {step}  {text}"
        if logs.as_json():
            text = logs.line("train", self._folder.uri, text, step=step, **more)
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def _warn_of_growth(self, step: int, values: dict[str, float]) -> None:
        self._growing = self._growing + 1 if values.get("series_grows") else 0
        if self._growing == 5:
            self._say(step, "the Neumann series grew in 5 upper updates in a row; lower hypergradient.alpha")
