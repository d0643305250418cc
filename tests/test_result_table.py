"""The table of results: what stands in it, and that it is aligned Markdown."""

from __future__ import annotations

import math

import pytest
import scipy.stats

from cdr_dist.errors import UserError
from cdr_dist.evaluation.table import markdown, result_table, summarise

AUCS = {
    "target_only": [0.70, 0.72, 0.71],
    "joint": [0.69, 0.70, 0.72],
    "biao": [0.74, 0.73, 0.75],
}


def summary(recipe, seed, auc, model="conet", **more):
    test = {"auc": auc, "logloss": 0.6, "rows": 1625, "gauc_users": 40}
    return {"recipe": recipe, "model": model, "seed": seed, "metrics": {"valid": {"auc": 0.5}, "test": test}} | more


def runs():
    return [summary(recipe, seed, auc) for recipe, aucs in AUCS.items() for seed, auc in enumerate(aucs)]


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_table_holds_mean_sd_relative_improvement_and_p():
    header, rule, *rows = cells(result_table(runs(), against="biao"))
    assert header == ["model", "recipe", "seeds", "test auc", "test logloss", "RelaImpr", "p against biao"]
    assert rule[1].strip("-") == ""
    assert rule[3].strip("-") == ":"
    p = [scipy.stats.ttest_rel(AUCS[recipe], AUCS["biao"]).pvalue for recipe in ("target_only", "joint")]
    assert rows == [
        ["conet", "target_only", "3", "0.7100 ± 0.0100", "0.6000 ± 0.0000", "+0.00%", f"{p[0]:.4f}"],
        ["conet", "joint", "3", "0.7033 ± 0.0153", "0.6000 ± 0.0000", "-3.17%", f"{p[1]:.4f}"],
        ["conet", "biao", "3", "0.7400 ± 0.0100", "0.6000 ± 0.0000", "+14.29%", "-"],
    ]


def test_every_line_is_as_wide_as_the_others():
    lines = result_table(runs(), against="biao").splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines)


def test_order_of_the_runs_does_not_change_which_seeds_are_paired():
    backwards = [run for recipe in AUCS for run in reversed(runs()) if run["recipe"] == recipe]
    assert result_table(backwards, against="biao") == result_table(runs(), against="biao")


def test_pairs_are_the_seeds_that_both_methods_have():
    table = result_table([run for run in runs() if (run["recipe"], run["seed"]) != ("biao", 1)], against="biao")
    p = scipy.stats.ttest_rel([0.69, 0.72], [0.74, 0.75]).pvalue
    assert cells(table)[3][-1] == f"{p:.4f} (n=2)"


def test_one_seed_has_no_sd_and_no_p():
    rows = cells(result_table([run for run in runs() if run["seed"] == 0], metrics=["auc"], against="biao"))[2:]
    assert rows[1] == ["conet", "joint", "1", "0.6900", "-5.00%", "-"]


def test_models_and_datasets_are_kept_apart():
    both = [summary(recipe, 0, auc, model=model, data={"name": name})
            for name in ("beauty", "sports") for model in ("conet", "minet")
            for recipe, auc in (("target_only", 0.6 if name == "beauty" else 0.7), ("biao", 0.8))]  # fmt: skip
    header, _, *rows = cells(result_table(both, metrics=["auc"]))
    assert header == ["data", "model", "recipe", "seeds", "test auc", "RelaImpr"]
    assert [row[:3] for row in rows[:4]] == [
        ["beauty", "conet", "target_only"],
        ["beauty", "conet", "biao"],
        ["beauty", "minet", "target_only"],
        ["beauty", "minet", "biao"],
    ]
    assert [row[-1] for row in rows] == ["+0.00%", "+200.00%"] * 2 + ["+0.00%", "+50.00%"] * 2


def test_missing_values_and_methods_are_dashes():
    run = summary("biao", 0, None)
    run["metrics"]["test"]["unseen"] = {"user": 0.1}  # a breakdown is no metric
    other = summary("joint", 0, 0.7)
    other["metrics"]["test"]["gauc"] = 0.65
    header, _, *rows = cells(result_table([run, other]))
    assert header == ["model", "recipe", "seeds", "test auc", "test logloss", "test gauc", "RelaImpr"]
    assert rows == [
        ["conet", "biao", "1", "-", "0.6000", "-", "-"],
        ["conet", "joint", "1", "0.7000", "0.6000", "0.6500", "-"],
    ]


def test_methods_can_be_read_as_data():
    method = summarise(runs()[::-1], metrics=["auc"])[0]
    assert (method.recipe, method.seeds, method.values) == ("biao", [0, 1, 2], {"auc": AUCS["biao"]})
    assert method.mean("auc") == pytest.approx(0.74)
    assert method.sd("auc") == pytest.approx(0.01)
    assert method.comparison is None
    assert math.isnan(summarise(runs(), single="nothing")[0].relative_improvement)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ([summary("biao", 0, 0.7)], {}, "conet biao seed 0: given twice"),
        ([], {"split": "tset"}, "conet target_only seed 0: no metrics of split 'tset'; did you mean 'test'?"),
        ([], {"metrics": ["acu"]}, "no run has a metric 'acu'; did you mean 'auc'?"),
        ([], {"against": "bio"}, "no run of recipe 'bio' to compare with; did you mean 'biao'?"),
    ],
)
def test_mistakes_are_named(change, arguments, message):
    with pytest.raises(UserError) as error:
        result_table(runs() + change, **arguments)
    assert message in str(error.value)


def test_no_runs_is_a_table_without_rows():
    assert len(result_table([]).splitlines()) == 2


def test_markdown_escapes_bars():
    assert markdown(["a|b"], [["c"]]) == "| a\\|b |\n| ---- |\n| c    |"
