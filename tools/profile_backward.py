"""Counts every backward pass of a training cycle, through autograd itself, and says what each kind costs.

    python tools/profile_backward.py data=demo recipe=biao hypergradient.terms=3 upper.interval=20
    python tools/profile_backward.py data=demo preset=as_released cycles=1 trace=cycle.json json=cycle-table.json

Any option of jobs/train.py may follow, and: cycles (2: cycles that are measured, after one that is not), trace (a
Chrome trace), json (the table). In this process, one thread.

A pass is a call into autograd's engine; its kind is the span it runs in (cdr_dist/profiling.py). Times are wall times
of the spans, FLOPs those of matrix products and convolutions, memory what the span's operators allocated, all by
torch.profiler, which slows small operators down: compare kinds with one another, not with a run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from cdr_dist.configuration import TrainConfig, from_words
from cdr_dist.data.demo import dataset_of
from cdr_dist.errors import UserError
from cdr_dist.evaluation.table import markdown
from cdr_dist.jobs import run_job
from cdr_dist.profiling import PREFIX, innermost
from cdr_dist.training.checks import check_before_start
from cdr_dist.training.launch import alone, quiet_libraries
from cdr_dist.training.session import Session
from cdr_dist.training.worker import phases_of

ELSEWHERE = "(outside any span)"


@contextmanager
def counted_passes() -> Iterator[Counter[str]]:
    """Counts the calls into autograd's engine by the innermost open span."""
    found: Counter[str] = Counter()
    before = torch.autograd._engine_run_backward

    def counts(*args: Any, **kwargs: Any) -> Any:
        found[innermost() or ELSEWHERE] += 1
        return before(*args, **kwargs)

    torch.autograd._engine_run_backward = counts  # what Tensor.backward and autograd.grad both call
    try:
        yield found
    finally:
        torch.autograd._engine_run_backward = before


def profile(config: TrainConfig, cycles: int, trace: str = "") -> dict[str, Any]:
    """Kind -> calls, backward passes, milliseconds, MFLOP and allocated MiB, each a cycle; and the counts expected."""
    torch.set_num_threads(1)
    with alone():
        phase = phases_of(config)[0]
        session = Session(config, dataset_of(config.data), phase.cycle)
        try:
            for update in dict.fromkeys(phase.cycle):
                update.bind(session)
            run = lambda: [update.run(False) for update in phase.cycle]  # noqa: E731
            run()
            with counted_passes() as passes:
                for _ in range(cycles):
                    run()
            activities = [torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=activities, with_flops=True, profile_memory=True) as profiler:
                for _ in range(cycles):
                    run()
        finally:
            session.close()
    if trace:
        profiler.export_chrome_trace(trace)
    kinds = _costs(profiler.events(), cycles)
    for name, count in passes.items():
        kinds.setdefault(name, defaultdict(float))["passes"] = count / cycles
    lower = sum(update.counts for update in phase.cycle)
    return {"kinds": {n: dict(v) for n, v in kinds.items()}, "expected": expected(config, lower, len(phase.cycle))}


def expected(config: TrainConfig, lower: int, updates: int) -> dict[str, int]:
    """Backward passes of a cycle: by the paper's count, the true one, and that of the released algorithm."""
    if updates == lower:
        return {"one for every lower update": lower}
    k = config.hypergradient.terms
    return {
        "interval + K + 2 (the paper)": lower + k + 2,
        "interval + K + 3 (the true count)": lower + k + 3,
        "interval + K + 3 + 100 (as released)": lower + k + 103,
    }


def _costs(events: Any, cycles: int) -> dict[str, dict[str, float]]:
    kinds: dict[str, dict[str, float]] = {}
    for event in events:
        if event.name.startswith(PREFIX):
            of = kinds.setdefault(event.name.removeprefix(PREFIX), defaultdict(float))
            of["calls"] += 1 / cycles
            of["ms"] += event.cpu_time_total / 1000 / cycles
        else:
            parent = event.cpu_parent
            while parent is not None and not parent.name.startswith(PREFIX):
                parent = parent.cpu_parent
            if parent is not None:
                of = kinds.setdefault(parent.name.removeprefix(PREFIX), defaultdict(float))
                of["mflop"] += (event.flops or 0) / 1e6 / cycles
                of["mib"] += max(event.self_cpu_memory_usage, 0) / 2**20 / cycles
    return kinds


def table(found: dict[str, Any]) -> str:
    columns = {"calls": ".0f", "passes": ".0f", "ms": ".2f", "mflop": ".1f", "mib": ".1f"}
    rows = [[name, *(format(of.get(c, 0.0), f) for c, f in columns.items())] for name, of in found["kinds"].items()]
    total = {c: sum(of.get(c, 0.0) for of in found["kinds"].values()) for c in columns}
    rows.append(["all", *(format(total[c], f) for c, f in columns.items())])
    counts = [f"backward passes of a cycle: {total['passes']:.0f} counted"]
    counts += [f"{count} by {name}" for name, count in found["expected"].items()]
    return (
        markdown(["a cycle", "calls", "backward passes", "ms", "MFLOP", "MiB allocated"], rows)
        + "\n\n"
        + "; ".join(counts)
    )


def main(words: list[str]) -> None:
    own = {"cycles": "2", "trace": "", "json": ""}
    rest = []
    for word in words:
        key, _, value = word.partition("=")
        if key in own:
            own[key] = value
        else:
            rest.append(word)
    if not own["cycles"].isdigit() or own["cycles"] == "0":
        raise UserError(f"cycles={own['cycles']}: must be a whole number, at least 1")
    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        config = from_words(["trainer.workers=0", *rest, f"run={folder}/run"])
        check_before_start(config, dataset_of(config.data))
        found = profile(config, int(own["cycles"]), own["trace"])
    if own["json"]:
        Path(own["json"]).write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    sys.exit(run_job("profile_backward", __doc__, main))
