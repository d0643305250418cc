"""From the command to the first logged step: a process, Ray where there are workers, a tiny dataset."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tools.bench_case import Build, Case, Run
from tools.bench_data import Shape, scratch, written

LIMIT_S = 300.0


def cases(quick: bool, data: str) -> dict[str, Build]:
    """The baseline is the time that is wanted."""
    wanted = {0: 10.0} if quick else {0: 10.0, 2: 40.0}
    return {f"trainer.workers={workers}": partial(case, workers, seconds) for workers, seconds in wanted.items()}


def case(workers: int, seconds: float, held: ExitStack) -> Case:
    folder = written(held, Shape(400, 100, 100, 50))
    ours = partial(_first_step, folder, workers, held)
    return Case(1.0, ours, lambda: Run(seconds), unit="start", rounds=3)


def _first_step(folder: str, workers: int, held: ExitStack) -> Run:
    root, run = Path(__file__).resolve().parent.parent, Path(scratch(held)) / "run"
    words = [f"data={folder}", f"run={run}", f"trainer.workers={workers}"]
    words += ["recipe=joint", "trainer.max_steps=1", "trainer.log_every=1"]
    start = time.time()
    subprocess.run(
        [sys.executable, "jobs/train.py", *words], cwd=root, check=True, capture_output=True, timeout=LIMIT_S
    )
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["split"] == "train"
    return Run(first["time"] - start)
