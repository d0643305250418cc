"""Runs collected into methods, and tables as aligned Markdown."""

from __future__ import annotations

import math

import pytest
import scipy.stats

from cdr_dist.errors import UserError
from cdr_dist.evaluation.table import markdown, summarise

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


def test_methods_have_means_relative_improvement_and_p():
    found = {method.recipe: method for method in summarise(runs(), against="biao")}
    assert list(found) == ["target_only", "joint", "biao"]
    assert [method.mean("auc") for method in found.values()] == pytest.approx([0.71, 0.70333333, 0.74])
    assert list(found["biao"].values) == ["auc", "logloss"], "counts are no metrics"
    improved = [method.relative_improvement for method in found.values()]
    assert improved == pytest.approx([0.0, -3.1746, 14.2857], abs=1e-4)
    for recipe in ("target_only", "joint"):
        p = scipy.stats.ttest_rel(AUCS[recipe], AUCS["biao"]).pvalue
        assert found[recipe].comparison.p == pytest.approx(p)


def test_order_of_the_runs_does_not_change_which_seeds_are_paired():
    backwards = [run for recipe in AUCS for run in reversed(runs()) if run["recipe"] == recipe]
    one, other = (summarise(given, metrics=["auc"], against="biao") for given in (runs(), backwards))
    assert [m.comparison for m in one] == [m.comparison for m in other]


def test_pairs_are_the_seeds_that_both_methods_have():
    some = [run for run in runs() if (run["recipe"], run["seed"]) != ("biao", 1)]
    joint = summarise(some, against="biao")[1].comparison
    assert joint.p == pytest.approx(scipy.stats.ttest_rel([0.69, 0.72], [0.74, 0.75]).pvalue)
    assert joint.n == 2


def test_one_seed_has_no_sd_and_no_p():
    joint = summarise([run for run in runs() if run["seed"] == 0], metrics=["auc"], against="biao")[1]
    assert math.isnan(joint.sd("auc"))
    assert math.isnan(joint.comparison.p)


def test_models_and_datasets_are_kept_apart():
    both = [summary(recipe, 0, auc, model=model, data={"name": name})
            for name in ("beauty", "sports") for model in ("conet", "minet")
            for recipe, auc in (("target_only", 0.6 if name == "beauty" else 0.7), ("biao", 0.8))]  # fmt: skip
    found = summarise(both, metrics=["auc"])
    assert [(m.data, m.model, m.recipe) for m in found[:4]] == [
        ("beauty", "conet", "target_only"),
        ("beauty", "conet", "biao"),
        ("beauty", "minet", "target_only"),
        ("beauty", "minet", "biao"),
    ]
    assert [m.relative_improvement for m in found] == pytest.approx([0, 200] * 2 + [0, 50] * 2)


def test_missing_values_are_no_numbers():
    run = summary("biao", 0, None)
    run["metrics"]["test"]["unseen"] = {"user": 0.1}  # a breakdown is no metric
    other = summary("joint", 0, 0.7)
    other["metrics"]["test"]["gauc"] = 0.65
    biao, joint = summarise([run, other])
    assert list(biao.values) == ["auc", "logloss", "gauc"]
    assert (math.isnan(biao.mean("auc")), math.isnan(biao.mean("gauc")), joint.mean("gauc")) == (True, True, 0.65)
    assert math.isnan(joint.relative_improvement)


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
        summarise(runs() + change, **arguments)
    assert message in str(error.value)


def test_every_line_is_as_wide_as_the_others():
    lines = markdown(["model", "seeds"], [["conet", "3"], ["a longer one", "12,000"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert (lines[1][:5], lines[1][-3:]) == ("| ---", ": |")


def test_markdown_escapes_bars():
    assert markdown(["a|b"], [["c"]]) == "| a\\|b |\n| ---- |\n| c    |"
