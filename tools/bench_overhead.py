"""What BIAO costs on top of joint training: whole steps from the stream, in the product's own cycle."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from cdr_dist.data.demo import write_planted
from cdr_dist.data.synthetic import Planted
from tools.bench_case import Build, Case
from tools.bench_data import scratch
from tools.bench_flops import counted_flops, lower_flops
from tools.bench_training import Training


def cases(quick: bool, data: str) -> dict[str, Build]:
    intervals = (5,) if quick else (20, 100, 500)
    found: dict[str, Build] = {}
    for interval in intervals:
        # Only the middle one has a target in time: at 20 the upper steps are a choice of the user's.
        wanted = 1 / 1.5
        found[f"biao against joint, interval {interval}"] = partial(case, quick, data, interval, "recipe=joint", wanted)
    for interval in intervals:
        wanted = 1 / (1 + 8 / interval)
        found[f"with upper steps against without, interval {interval}"] = partial(
            case, quick, data, interval, "", wanted
        )
    return found


def case(quick: bool, data: str, interval: int, against: str, target: float, held: ExitStack) -> Case:
    """`against`: a recipe; '': BIAO's lower updates alone."""
    folder = data or _planted(quick, held)
    words = ["batch.size=64", "batch.history_length=20", f"upper.interval={interval}"]
    ours = Training(held, folder, ["recipe=biao", *words])
    baseline = Training(held, folder, [against or "recipe=biao", *words], upper=False)
    steps = interval * (1 if quick else max(1, 200 // interval))
    sides = (partial(ours.steps, steps), partial(baseline.steps, steps))
    flops = lower_flops(ours.session) + counted_flops(partial(ours.update[False].run, False)) / interval
    return Case(target, *sides, unit="step", units=(steps, steps), flops=flops, rounds=5)


def _planted(quick: bool, held: ExitStack) -> str:
    folder = str(Path(scratch(held)) / "planted")
    write_planted(Planted(users=200) if quick else Planted(), folder)
    return folder
