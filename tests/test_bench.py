"""The benchmark runs, and its baselines compute what we compute."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import polars as pl
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from cdr_dist.bilevel.options import PerceptronOptions
from cdr_dist.bilevel.perceptron import HISTORIES, BehaviouralPerceptron, PerceptronInput, history_items
from cdr_dist.errors import UserError
from tests.problem import replaced
from tools import bench, bench_prepare, bench_prepare_polars, bench_upper
from tools.bench_case import Case, Run, measured
from tools.bench_check import Committed, of_repeats, worse
from tools.bench_lower import Plain, lower_training
from tools.bench_lower_limit import Bare
from tools.bench_perceptron import Padded


def test_the_padded_baseline_is_our_perceptron_as_released():
    torch.manual_seed(3)
    options = PerceptronOptions(padding=6)
    ours, baseline = BehaviouralPerceptron(4, options), Padded(4, options)
    for domain in HISTORIES:
        theirs = baseline.attention[domain]
        ours.attention[domain].query.weight.data = theirs["query"].weight.data
        ours.attention[domain].key.weight.data = theirs["key"].weight.data[:, :8]
        ours.attention[domain].value.weight.data = theirs["value"].weight.data
    ours.global_mlp[0].load_state_dict(baseline.global_mlp.state_dict())
    linear = [layer for layer in baseline.local_mlp if isinstance(layer, torch.nn.Linear)]
    for mine, theirs in zip(ours.local_mlp, linear, strict=True):
        mine.load_state_dict(theirs.state_dict())
    tables = {d: torch.randn(20, 8) for d in HISTORIES}
    for table in tables.values():
        table[0] = 0.0
    ids = {"source": [[3, 4, 5], [6], [7, 3, 2, 9, 11, 12]], "target": [[1], [2, 2, 3], [5, 4]]}
    source = torch.randn(3, 8)
    padded = {d: torch.tensor([row + [0] * (6 - len(row)) for row in rows]) for d, rows in ids.items()}
    lists = [ids[d] for d in HISTORIES for _ in ("item", "category")]
    jagged = KeyedJaggedTensor(
        keys=[f"{d}_history_{part}" for d in HISTORIES for part in ("item", "category")],
        values=torch.tensor([i for rows in lists for row in rows for i in row]),
        lengths=torch.tensor([len(row) for rows in lists for row in rows]),
    )
    found = history_items(jagged)
    seen = PerceptronInput(
        item=source,
        history={d: tables[d][found[d].item] for d in HISTORIES},
        position={d: found[d].position for d in HISTORIES},
        lengths={d: found[d].lengths for d in HISTORIES},
    )
    assert torch.allclose(ours(seen), baseline(tables, source, padded), atol=1e-5)


@pytest.fixture
def held():
    """A stack that is closed after the test."""
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        yield stack
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("baseline", "optimiser"),
    [
        (partial(Plain, kind="sparse"), "adagrad"),
        (partial(Plain, kind="sparse by hand"), "rowwise_adagrad"),
        (Bare, "rowwise_adagrad"),
    ],
)
def test_the_baselines_of_a_lower_step_train_as_ours_does(held, baseline, optimiser):
    training = lower_training(True, 32, 8, held, f"tables.optimiser={optimiser}")
    theirs = baseline(training.session)
    (_, ours), before = training.session.tables.shards()["user"], training.session.tables.shards()["user"][1].clone()
    losses = [training.update[True].run(False)["loss"] for _ in range(40)]
    assert losses == pytest.approx([theirs.step() for _ in losses], rel=1e-4)
    rows = (
        theirs.tables["user"].weight.detach()
        if isinstance(theirs, Plain)
        else theirs.tables.split_embedding_weights()[0]
    )
    assert float((rows - ours).norm()) < 1e-3 * float((ours - before).norm())


def test_the_dense_hypergradient_is_ours_with_the_same_weights(held):
    case = bench_upper.series_case(True, 300, 1.0, held)
    ours, (dense, _) = case.ours().phi["score"], case.baseline()
    assert torch.allclose(ours, dense["score"], rtol=1e-3, atol=1e-3 * float(ours.abs().max()))


def test_the_polars_baseline_writes_the_rows_that_prepare_writes(tmp_path):
    bench_prepare.write_logs(tmp_path, 5000)
    bench_prepare.ours(tmp_path, tmp_path / "ours")
    bench_prepare_polars.polars(tmp_path, tmp_path / "polars")
    for split in ("train", "valid", "test"):
        ours, theirs = (
            pl.read_parquet(tmp_path / side / split / "*.parquet").sort("example_id") for side in ("ours", "polars")
        )
        ours = ours.drop("negatives_item")
        theirs = theirs.select(pl.col(name).cast(kind) for name, kind in ours.schema.items())
        lists = [name for name, kind in ours.schema.items() if kind == pl.List]
        assert ours.equals(theirs.with_columns(pl.col(lists).fill_null([])))


def test_units_and_sides_that_measure_themselves():
    once = measured("s", "c", Case(1.0, lambda: Run(6.0, 1.5), lambda: Run(8.0), units=(3.0, 2.0), rounds=3), False)
    assert (once.seconds, once.baseline_seconds, once.ratio, once.peak_rss_gb) == (2.0, 4.0, 2.0, 1.5)


def test_a_ratio_is_worse_beyond_noise_only():
    quiet, noisy = Committed("s", "quiet", 2.0, 0.01), Committed("s", "noisy", 2.0, 0.2)
    found = {("s", "quiet"): 1.81, ("s", "noisy"): 1.21}
    assert worse([quiet, noisy], found) == []
    assert worse([quiet, noisy], found | {("s", "quiet"): 1.79}) == [quiet]
    assert worse([quiet, noisy], found | {("s", "noisy"): 1.19}) == [noisy]
    assert worse([quiet, noisy], {("s", "noisy"): 9.0}) == [quiet], "what was not measured counts as worse"


def test_committed_ratios_are_medians_with_their_range():
    assert of_repeats([{("s", "c"): r} for r in (1.0, 2.0, 2.5)]) == [Committed("s", "c", 2.0, 0.75)]
    with pytest.raises(UserError, match="three"):
        of_repeats([{("s", "c"): 1.0}] * 2)


def test_the_check_says_which_ratio_is_worse(capsys):
    from tools import bench_check

    committed = [Committed(**entry) for entry in json.loads(bench_check.RATIOS.read_text())]
    assert {c.suite for c in committed} <= set(bench.SUITES)
    results = [bench.Result(c.suite, c.case, "call", 1.0, c.ratio, c.ratio, 1.0, 0.1, None) for c in committed]
    with replaced(bench, "run", lambda suites, quick: results):
        bench_check.main([])
    assert "WORSE" not in capsys.readouterr().out
    with replaced(bench, "run", lambda suites, quick: results[1:]), pytest.raises(SystemExit, match="1"):
        bench_check.main([])
    assert capsys.readouterr().out.count("WORSE") == 1


def test_every_suite_runs_quickly(capsys, tmp_path):
    bench.main(["--quick", "--json", str(tmp_path / "lines")])
    found = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")] == found
    assert {one["suite"] for one in found} == set(bench.SUITES)
    assert all(one["seconds"] > 0 and one["ratio"] > 0 and one["peak_rss_gb"] > 0.05 for one in found)
