"""The benchmark runs, and its baseline computes what we compute."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from cdr_dist.bilevel.options import PerceptronOptions
from cdr_dist.bilevel.perceptron import HISTORIES, BehaviouralPerceptron, PerceptronInput, history_items
from tools import bench
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


def test_every_suite_runs_quickly(capsys):
    bench.main(["--quick"])
    *lines, _, _, _ = [line for line in capsys.readouterr().out.splitlines() if line]
    found = [json.loads(line) for line in lines]
    assert {one["suite"] for one in found} == set(bench.SUITES)
    assert all(one["seconds"] > 0 and one["ratio"] > 0 and one["peak_rss_gb"] > 0.1 for one in found)
