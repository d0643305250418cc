"""The benchmark runs, and its baselines compute what we compute."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import polars as pl
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from cdr_dist.bilevel.options import PerceptronOptions
from cdr_dist.bilevel.perceptron import HISTORIES, BehaviouralPerceptron, PerceptronInput
from tests import reference
from tests.problem import history, replaced
from tools import bench, bench_case, bench_check, bench_evaluate, bench_prepare, bench_prepare_polars, bench_upper
from tools.bench_case import ONE_THREAD, Case, Run, measured
from tools.bench_check import Committed, of_repeats, worse
from tools.bench_flops import conet_flops, counted_flops, lower_flops, perceptron_flops
from tools.bench_lower import WANTED, Plain, lower_training
from tools.bench_lower_limit import Bare
from tools.bench_perceptron import Padded
from tools.bench_upper import as_reference


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
    found = {d: history(ids[d]) for d in HISTORIES}
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


@pytest.mark.parametrize("kind", WANTED)
def test_the_plain_baselines_are_the_dense_reference_with_their_optimiser(held, kind):
    """Losses and rows after three steps, to float32's rounding; heads that pass a gradient on from the first step."""
    session = lower_training(True, 32, 8, held).session
    for head in (session.model.target_head, session.model.source_head):
        torch.nn.init.constant_(head.weight, 0.5)
    plain = Plain(session, kind)
    tables = {n: rows.clone().requires_grad_() for n, (_, rows) in session.tables.shards().items()}
    dense = {n: p.detach().clone().requires_grad_() for n, p in session.model.named_parameters()}
    batches = [as_reference(b) | {"source_valid": b.source_valid} for _, b in plain.batches[:3]]
    before, rate = {n: t.detach().clone() for n, t in tables.items()}, session.config.tables.lr
    losses = reference_losses(kind, tables, dense, batches, rate, session.config.dense.lr)
    assert [plain.step() for _ in losses] == pytest.approx(losses, rel=1e-6)
    for name, table in tables.items():
        moved = float((table.detach() - before[name]).norm())
        assert moved > 0
        assert float((plain.tables[name].weight - table).detach().norm()) < 1e-4 * moved


def reference_losses(kind, tables, dense, batches, lr_tables, lr_dense):
    """Joint steps of tests/reference.py, in place: row-wise Adagrad is its own, Adagrad and Adam are torch's, dense."""
    if kind == "sparse by hand":
        weigh = lambda _, batch: reference.joint_weights(batch, 1.0)  # noqa: E731
        return reference.train(tables, dense, batches, len(batches), lr_tables, lr_dense, weigh)
    optimisers = [torch.optim.Adam([*dense.values(), *(tables.values() if kind == "dense" else ())], lr=lr_dense)]
    if kind == "sparse":
        optimisers.append(torch.optim.Adagrad(tables.values(), lr=lr_tables, eps=1e-8))
    losses = []
    for batch in batches:
        target, source, _ = reference.conet(tables, dense, batch)
        loss = reference.joint_loss(target, source, batch, 1.0)
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        losses.append(loss.item())
    return losses


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


def test_sides_take_turns_and_medians_are_compared():
    order = []

    def scripted(name, seconds):
        left = iter(seconds)

        def side():
            order.append(name)
            return Run(next(left))

        return side

    # The first of each only says how often it is called in a turn.
    found = measured(
        "s", "c", Case(1.0, scripted("ours", [5, 1, 9, 2]), scripted("base", [5, 4, 3, 30]), rounds=3), False
    )
    assert order == ["ours", "base"] * 4
    assert (found.seconds, found.baseline_seconds, found.ratio) == (2, 4, 2.0)


def test_the_share_of_the_roofline_is_of_the_work_of_a_unit():
    with replaced(bench_case, "gemm_rate", lambda: 100.0), replaced(bench_case, "copy_rate", lambda: 10.0):

        def share(moved=0.0, **work):
            case = Case(1.0, lambda: Run(4.0, nbytes=moved), lambda: Run(1.0), units=(2.0, 1.0), **work)
            return measured("s", "c", case, True).roofline_share

        assert share(flops=50.0) == 50.0 / 2.0 / 100.0
        assert share(nbytes=5.0) == share(moved=10.0) == 5.0 / 2.0 / 10.0
        assert share() is None


def test_flops_are_those_that_are_computed(held):
    training = lower_training(True, 32, 8, held)
    step = partial(training.steps, 1)
    assert lower_flops(training.session) == counted_flops(step) == 3 * 32 * conet_flops(training.session.config)


def test_flops_of_the_perceptron_are_at_most_those_of_padded_operators():
    """Histories of one length: nothing is filled up, and operators compute the scores of every copy."""
    rows, n, copies, width = 12, 6, 1, 4
    torch.manual_seed(3)
    perceptron = BehaviouralPerceptron(width, PerceptronOptions())
    found = {d: history(torch.randint(1, 9, (rows // copies, n)).tolist()) for d in HISTORIES}
    seen = PerceptronInput(
        item=torch.randn(rows, 2 * width),
        history={d: torch.randn(len(found[d].item), 2 * width) for d in HISTORIES},
        position={d: found[d].position for d in HISTORIES},
        lengths={d: found[d].lengths for d in HISTORIES},
    )
    counted = counted_flops(lambda: perceptron(seen))
    assert 0.7 * counted < perceptron_flops(perceptron, found, rows) <= counted


def threads():
    import numba
    import pyarrow as pa

    found = {"torch": torch.get_num_threads(), "polars": pl.thread_pool_size(), "arrow": pa.cpu_count()}
    return found | {"numba": numba.get_num_threads()} | {name: int(os.environ[name]) for name in ONE_THREAD}


def test_the_process_that_measures_has_one_thread(monkeypatch):
    for name in ONE_THREAD:
        monkeypatch.setenv(name, "2")
    with bench.measuring_process(False) as process:
        assert set(process.submit(threads).result().values()) == {1}
    assert {os.environ[name] for name in ONE_THREAD} == {"2"}, "and ours keeps its own"


def test_a_ratio_is_worse_beyond_noise_only():
    quiet, noisy = Committed("s", "quiet", 2.0, 0.01), Committed("s", "noisy", 2.0, 0.2)
    found = {("s", "quiet"): 1.81, ("s", "noisy"): 1.21}
    assert worse([quiet, noisy], found) == []
    assert worse([quiet, noisy], found | {("s", "quiet"): 1.79}) == [quiet]
    assert worse([quiet, noisy], found | {("s", "noisy"): 1.19}) == [noisy]
    assert worse([quiet, noisy], {("s", "noisy"): 9.0}) == [quiet], "what was not measured counts as worse"


def test_committed_ratios_are_medians_with_their_range():
    assert of_repeats([{("s", "c"): r} for r in (1.0, 2.0, 2.5)]) == [Committed("s", "c", 2.0, 0.75)]
    assert Committed("s", "c", 2.0, 0.75).least == 1.0  # however noisy, half of it is a loss


def test_the_check_says_which_ratio_is_worse_and_what_it_does_not_look_at(capsys):
    committed = [Committed(**entry) for entry in json.loads(bench_check.RATIOS.read_text())]
    results = {(c.suite, c.case): c.ratio for c in committed}
    asked = []

    def run(suites, quick, only):
        asked.append(set(only))
        return [bench.Result(*case, "call", 1.0, results[case], results[case], 1.0, 0.1, None) for case in only]

    with replaced(bench, "run", run):
        bench_check.main([])
        shown = capsys.readouterr().out
        assert "WORSE" not in shown
        (line,) = [line for line in shown.splitlines() if line.startswith("not checked: start: ")]
        assert "trainer.workers=2" in line
        first = (committed[0].suite, committed[0].case)
        results[first] = 0.0
        asked.clear()
        with pytest.raises(SystemExit, match="1"):
            bench_check.main([])
        assert asked == [set(results), {first}, {first}], "what looks worse is measured again"
    assert capsys.readouterr().out.count("WORSE") == 1


def test_a_burst_of_load_is_not_a_regression():
    committed, later = [Committed("s", "c", 2.0, 0.01)], iter([2.0, 1.9])
    with replaced(bench_check, "measure", lambda cases: {("s", "c"): next(later)}):
        assert bench_check.confirmed(committed, {("s", "c"): 0.5}) == {("s", "c"): 1.9}


def test_what_is_checked_exists_and_is_written_with_its_noise(tmp_path):
    cases = {(suite, case) for suite, of in bench_check.CHECKED.items() for case in of}
    assert bench_check.CHECKED.keys() == set(bench.SUITES)
    assert cases <= {(suite, case) for suite in bench.SUITES for case in bench.cases(suite, False, "")}
    ratio = iter([1.0, 2.0, 2.5])

    def run(suites, quick, only):
        now = next(ratio)
        return [bench.Result(*case, "call", 1.0, now, now, 1.0, 0.1, None) for case in only]

    with replaced(bench_check, "RATIOS", tmp_path / "ratios.json"), replaced(bench, "run", run):
        bench_check.main(["write"])
        found = [Committed(**entry) for entry in json.loads(bench_check.RATIOS.read_text())]
    assert {(c.suite, c.case) for c in found} == cases
    assert {(c.ratio, c.noise) for c in found} == {(2.0, 0.75)}


KEYS = {
    "suite",
    "case",
    "unit",
    "seconds",
    "baseline_seconds",
    "ratio",
    "target",
    "peak_rss_gb",
    "roofline_share",
}


@pytest.mark.soak
def test_every_suite_runs_quickly(capsys, tmp_path):
    bench.main([*bench.SUITES, *bench.ON_A_GPU, "--quick", "--json", str(tmp_path / "lines")])
    found = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")] == found
    assert {one["suite"] for one in found} == {*bench.SUITES, *bench.ON_A_GPU}
    assert all(one.keys() == KEYS for one in found)
    assert all(one["seconds"] > 0 and one["ratio"] > 0 and one["peak_rss_gb"] > 0.05 for one in found)
    shares = {(one["suite"], one["case"]): one["roofline_share"] for one in found}
    assert {suite for (suite, _), share in shares.items() if share is None} == {"stall", "start", "device"}
    assert not [case for case, share in shares.items() if share is not None and not 0 < share <= 1.5]
    assert all(share is None for (suite, _), share in shares.items() if suite in ("stall", "start", "device"))


def test_the_plain_loop_of_products_finds_what_full_ranking_finds(held):
    case = bench_evaluate.product_case(True, 10, held)
    assert case.ours() == pytest.approx(case.baseline())
