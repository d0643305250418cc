"""Counts every backward pass of a training cycle, through autograd itself, and says what each kind costs.

    python tools/profile_backward.py data=demo recipe=biao hypergradient.terms=3 upper.interval=20
    python tools/profile_backward.py data=demo preset=as_released cycles=1 --trace cycle.json json=cycle-table.json

Any option of jobs/train.py may follow, and (as NAME=VALUE, --NAME=VALUE or --NAME VALUE): cycles (2: cycles that are
measured, after one that is not), phase (of several only this one), trace (a Chrome trace; a file a phase), json (the
table). In this process, one thread; upper updates as after the warm-up.

A pass is a call into autograd's engine; its kind is the span it runs in (cdr_dist/profiling.py). Times are wall times
of the spans, FLOPs those of matrix products and convolutions (without compiled loops), memory what the span's operators
allocated and the most that one call held at a time above what was there before, of the device that trains. All by
torch.profiler, which slows small operators down: compare kinds with one another, not with a run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from cdr_dist.configuration import TrainConfig, from_words
from cdr_dist.data.demo import dataset_of
from cdr_dist.data.words import whole_number
from cdr_dist.errors import UserError, nearest
from cdr_dist.evaluation.table import markdown
from cdr_dist.jobs import run_job
from cdr_dist.profiling import PREFIX, innermost
from cdr_dist.training.checks import check_before_start
from cdr_dist.training.launch import alone, quiet_libraries
from cdr_dist.training.loop import Update
from cdr_dist.training.session import Session
from cdr_dist.training.worker import phases_of

ELSEWHERE = "(outside any span)"
MEMORY = "[memory]"
NOT_PRODUCTS = ("aten::add", "aten::mul")
"""torch.profiler counts their FLOPs, too, but not those of other operators of that kind."""


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


def profile(config: TrainConfig, cycles: int, trace: str = "", phase: str = "") -> dict[str, Any]:
    """Phase -> `kinds`: kind -> calls, backward passes, milliseconds, MFLOP, MiB, each a cycle; and `expected` counts.

    phase: only this one. trace: a file, of several phases one each with the phase's name before its suffix.
    """
    torch.set_num_threads(1)
    config = replace(config, upper=replace(config.upper, warm_up_epochs=0))
    phases = {p.name: p.cycle for p in phases_of(config)}
    if phase and phase not in phases:
        raise UserError(f"phase={phase}: the recipe has no such phase; {nearest(phase, list(phases))}")
    chosen = {name: cycle for name, cycle in phases.items() if phase in ("", name)}
    found = {}
    with alone():
        session = Session(config, dataset_of(config.data), [update for cycle in phases.values() for update in cycle])
        try:
            for name, cycle in chosen.items():
                session.enter(cycle)
                passes, profiler = _profiled(cycle, cycles)
                if trace:
                    file = Path(trace)
                    profiler.export_chrome_trace(
                        str(file if len(chosen) == 1 else file.with_stem(f"{file.stem}-{name}"))
                    )
                kinds = _costs(profiler.profiler.kineto_results.events(), cycles, config.trainer.device)
                for kind, count in passes.items():
                    kinds[kind]["passes"] = count / cycles
                found[name] = {"kinds": {n: dict(v) for n, v in kinds.items()}, "expected": expected(config, cycle)}
        finally:
            session.close()
    return found


def _profiled(cycle: Sequence[Update], cycles: int) -> tuple[Counter[str], Any]:
    """The passes of some cycles, and a profile of as many."""

    def run(times: int) -> None:
        for update in list(cycle) * times:
            update.run(False)

    run(1)
    with counted_passes() as passes:
        run(cycles)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, with_flops=True, profile_memory=True) as profiler:
        run(cycles)
    return passes, profiler


def expected(config: TrainConfig, cycle: Sequence[Update]) -> dict[str, int]:
    """Backward passes of a cycle: by the paper's count, the true one, that of the released algorithm, and the options'.

    As configured, a lower update in parts is a pass a part and one through the lookup; the mixed derivative is two, by
    the weights and from them, unless weights have a second order of their own; and the extra head may be trained.
    """
    lower = sum(update.counts for update in cycle)
    upper = len(cycle) - lower
    k, flows = config.hypergradient.inverse_products, upper > 0 and config.perceptron.item_gradient
    # Losses that are differentiated apart meet the tables as one: a pass more, through the lookup.
    made = sum(update.passes + (update.passes > 1) for update in cycle if update.counts)
    rows = config.batch.size
    if config.batch.accumulate > 1:
        size = -(-rows // min(config.batch.accumulate, rows))
        made = lower * (-(-rows // size) + 1 + flows)
    found = {"one for every lower update": lower}
    if upper:
        true = config.hypergradient.passes - k
        found = {
            "interval + K + 2 (the paper)": lower + upper * (k + 2),
            f"interval + K + {true} (the true count)": lower + upper * (k + true),
            "interval + K + 3 + 100 (as released)": lower + upper * (k + 103),
        }
        refresh = config.upper.head_refresh if config.upper.dev_head == "extra" else ""
        head = int(refresh.removeprefix("dev:")) if refresh.startswith("dev:") else 0
        made += upper * (head + k + true + (not flows))
    return found | {"the options": made}


@dataclass
class _Open:
    """A span that has begun; held: bytes since, less what was given back."""

    kind: str
    end: int
    held: int = 0


def _costs(events: Iterable[Any], cycles: int, device: str) -> dict[str, dict[str, float]]:
    """What happens belongs to the innermost span of that time, in whatever thread (CUDA's backward has its own)."""
    kinds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    spans: list[_Open] = []
    where = torch.device(device).type.upper()
    for event in sorted(events, key=lambda e: (e.start_ns(), -e.duration_ns())):
        name, start = event.name(), event.start_ns()
        while spans and start > spans[-1].end:
            spans.pop()
        if name.startswith(PREFIX) and event.device_type().name == "CPU":
            spans.append(_Open(name.removeprefix(PREFIX), start + event.duration_ns()))
            of = kinds[spans[-1].kind]
            of["calls"] += 1 / cycles
            of["ms"] += event.duration_ns() / 1e6 / cycles
        elif name == MEMORY and event.device_type().name == where:
            for span in spans:
                span.held += event.nbytes()
                kinds[span.kind]["peak_mib"] = max(kinds[span.kind]["peak_mib"], span.held / 2**20)
            if spans:
                kinds[spans[-1].kind]["mib"] += max(event.nbytes(), 0) / 2**20 / cycles
        elif spans and name not in NOT_PRODUCTS:
            kinds[spans[-1].kind]["mflop"] += event.flops() / 1e6 / cycles
    return kinds


def table(found: dict[str, Any]) -> str:
    """Of one phase."""
    columns = {"calls": ".0f", "passes": ".0f", "ms": ".2f", "mflop": ".1f", "mib": ".1f", "peak_mib": ".1f"}
    rows = [[name, *(format(of.get(c, 0.0), f) for c, f in columns.items())] for name, of in found["kinds"].items()]
    total = {c: sum(of.get(c, 0.0) for of in found["kinds"].values()) for c in columns}
    total["peak_mib"] = max(of.get("peak_mib", 0.0) for of in found["kinds"].values())
    rows.append(["all", *(format(total[c], f) for c, f in columns.items())])
    counts = [f"backward passes of a cycle: {total['passes']:.0f} counted"]
    counts += [f"{count} by {name}" for name, count in found["expected"].items()]
    head = ["a cycle", "calls", "backward passes", "ms", "MFLOP", "MiB allocated", "MiB held at most"]
    return markdown(head, rows) + "\n\n" + "; ".join(counts)


def main(words: list[str]) -> None:
    own, rest = own_options(words)
    cycles = whole_number("cycles", own["cycles"], 1)
    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        config = from_words(["trainer.workers=0", *rest, f"run={folder}/run"])
        check_before_start(config, dataset_of(config.data))
        found = profile(config, cycles, own["trace"], own["phase"])
    if own["json"]:
        Path(own["json"]).write_text(json.dumps(found, indent=1) + "\n")
    for name, of in found.items():
        print(f"phase {name}\n\n{table(of)}\n")


def own_options(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Those of this tool, and the words that are left. UserError: one without a value."""
    own, rest = {"cycles": "2", "phase": "", "trace": "", "json": ""}, []
    left = list(words)
    while left:
        word = left.pop(0)
        name, _, value = word.removeprefix("--").partition("=")
        if name not in own or word == name:
            rest.append(word)
            continue
        if "=" not in word:
            if not left:
                raise UserError(f"{word}: give a value")
            value = left.pop(0)
        own[name] = value
    return own, rest


if __name__ == "__main__":
    sys.exit(run_job("profile_backward", __doc__, main))
