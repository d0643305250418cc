"""DASL against a plain loop over rows and steps, and its limit cases."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cdr_dist.embeddings.initialisation import initialise_dense
from cdr_dist.models.dasl import DASL
from tests.problem import history

WIDTH, COPIES, MEMORY, RECENT = 3, 2, 4, 2
LISTS = {"target": [[4, 2], [], [2, 2, 7]], "source": [[5], [9, 3, 5], []]}
"""Of three histories; every one belongs to two rows."""
BEFORE = [0, 1, 1, 3, 0, 0]
"""Of each row: how much of the source history came before its source behaviour."""


def random_model(source=True):
    torch.manual_seed(1)
    model = DASL(WIDTH, hidden=(6, 5), memory=MEMORY, recent=RECENT, source=source).double()
    for p in model.parameters():
        torch.nn.init.normal_(p)
    return model


def random_rows():
    torch.manual_seed(2)
    tables = {f"{d}_{part}": torch.randn(10, WIDTH).double() for d in LISTS for part in ("item", "category")}
    histories = {d: history(of, [[i % 4 for i in row] for row in of]) for d, of in LISTS.items()}
    users = {name: torch.randn(3, WIDTH).double().repeat_interleave(COPIES, 0) for name in ("user", "source_user")}
    rows = {f"{d}_{part}": torch.randn(6, WIDTH).double() for d in LISTS for part in ("item", "category")}
    embedded = users | rows
    for d, of in histories.items():
        embedded[f"{d}_history_item"] = tables[f"{d}_item"][of.item]
        embedded[f"{d}_history_category"] = tables[f"{d}_category"][of.category]
    batch = SimpleNamespace(
        label=None, source_label=None, histories=histories, source_before=torch.tensor(BEFORE, dtype=torch.int64)
    )
    return tables, embedded, batch


def gru(p, domain, steps):
    """States after each step (Cho et al. 2014, as torch has it)."""
    name, h, said = f"memory.{domain}", torch.zeros(MEMORY).double(), []
    for x in steps:
        a = p[f"{name}.weight_ih_l0"] @ x + p[f"{name}.bias_ih_l0"]
        b = p[f"{name}.weight_hh_l0"] @ h + p[f"{name}.bias_hh_l0"]
        (r_a, z_a, n_a), (r_b, z_b, n_b) = a.chunk(3), b.chunk(3)
        r, z = (r_a + r_b).sigmoid(), (z_a + z_b).sigmoid()
        h = (1 - z) * (n_a + r * n_b).tanh() + z * h
        said.append(h)
    return said


def by_hand(model, tables, embedded):
    p = dict(model.named_parameters())
    if model.source:
        a = p["skew"] - p["skew"].T
        x = (torch.eye(WIDTH).double() - a) @ torch.linalg.inv(torch.eye(WIDTH).double() + a)
    logits = {}
    for domain in model.domains:
        found = []
        for row in range(6):
            users = {"target": embedded["user"][row], "source": embedded["source_user"][row]}
            said = []
            for of in model.domains:
                ids = LISTS[of][row // COPIES]
                if domain == of == "source":
                    ids = ids[: BEFORE[row]]
                steps = [
                    torch.cat([tables[f"{of}_item"][i], tables[f"{of}_category"][i % 4], users[domain]])
                    for i in ids[-RECENT:]
                ]
                said += gru(p, of, steps)
            name = f"attention.{domain}"
            scores = [
                p[f"{name}.out.weight"][0] @ (p[f"{name}.seen.weight"] @ h + p[f"{name}.seen.bias"]).tanh()
                for h in said
            ]
            share = torch.stack(scores).softmax(0) if scores else []
            preference = sum((w * h for w, h in zip(share, said, strict=True)), torch.zeros(MEMORY).double())
            user = users[domain]
            if model.source:
                user = user + (users["source"] @ x if domain == "target" else x @ users["target"])
            rest = [embedded[f"{domain}_{part}"][row] for part in ("item", "category")]
            h = torch.cat([preference, *rest, user])
            h = (h - h.mean()) / (h.var(unbiased=False) + 1e-5).sqrt()
            h = h * p[f"{domain}_tower.0.weight"] + p[f"{domain}_tower.0.bias"]
            for layer in (1, 3):
                h = (p[f"{domain}_tower.{layer}.weight"] @ h + p[f"{domain}_tower.{layer}.bias"]).sigmoid()
            found.append(p[f"{domain}_head.weight"][0] @ h + p[f"{domain}_head.bias"][0])
        logits[domain] = torch.stack(found)
    return logits


@pytest.mark.parametrize("source", [True, False])
def test_logits_are_those_of_a_plain_loop(source):
    model, (tables, embedded, batch) = random_model(source), random_rows()
    found, expected = model(embedded, batch), by_hand(model, tables, embedded)
    torch.testing.assert_close(found.target_logit, expected["target"])
    assert (found.source_logit is None) == (not source)
    if source:
        torch.testing.assert_close(found.source_logit, expected["source"])


def test_shares_of_both_domains_add_up_to_one_and_without_scores_are_equal():
    attention = random_model().attention["target"]
    x, real = torch.randn(4, 20, MEMORY).double(), torch.ones(4, 20, dtype=torch.bool)
    real[1, 5:], real[3] = False, False
    shares = attention.shares(x, real)
    torch.testing.assert_close(shares.sum(1), torch.tensor([1.0, 1.0, 1.0, 0.0]).double())
    torch.nn.init.zeros_(attention.out.weight)
    torch.testing.assert_close(attention.shares(x, real)[0], torch.full((20,), 1 / 20).double())
    torch.testing.assert_close(attention.shares(x, real)[1, :5], torch.full((5,), 1 / 5).double())


def test_the_map_between_users_is_orthogonal():
    model = random_model()
    x = model.orthogonal()
    torch.testing.assert_close(x @ x.T, torch.eye(WIDTH).double())
    assert (x - torch.eye(WIDTH)).abs().max() > 0.1


def test_a_source_behaviour_is_not_read_before_it_is_predicted():
    """Neither itself nor what came after it, however the rest changes."""
    model, (_, embedded, batch) = random_model(), random_rows()
    before = model(embedded, batch).source_logit
    history = batch.histories["source"]
    changed = embedded["source_history_item"].clone()
    changed[history.position[history.lengths.cumsum(0)[1] - 1]] += 1.0  # item 5, the second history's last
    after = model(embedded | {"source_history_item": changed}, batch).source_logit
    assert (before != after).tolist() == [False, True, False, True, False, False]  # rows 2 and 3 share that history


def test_first_losses_are_ln_2():
    model, (_, embedded, batch) = DASL(WIDTH), random_rows()
    initialise_dense(model, seed=8)
    model.double()
    batch.label = batch.source_label = torch.tensor([1.0, 0.0] * 3)
    for loss in model.losses(model(embedded, batch), batch):
        torch.testing.assert_close(loss, torch.full((6,), 2.0, dtype=torch.float64).log())
