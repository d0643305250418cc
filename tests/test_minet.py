"""MiNet against a plain loop over rows and positions, and its limit cases."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cdr_dist.embeddings.initialisation import initialise_dense
from cdr_dist.models.minet import MiNet
from tests.problem import history

WIDTH, COPIES = 3, 2
LISTS = {"target": [[4, 2], [], [2, 2, 7]], "source": [[5], [9, 3, 5], []]}
"""Of three histories; every one belongs to two rows."""


def random_model(source=True, features=()):
    torch.manual_seed(1)
    users = [f"user {column}" for column in features]  # two columns of items, two of users
    model = MiNet(
        WIDTH, hidden=(6, 4), attention=5, rank=2, source=source, features=features, user_features=users
    ).double()
    for p in model.parameters():
        torch.nn.init.normal_(p)
    return model


def random_rows(rows=6, features=()):
    """features: columns of items, whose values a table has summed by now: one row an item."""
    torch.manual_seed(2)
    parts = ("item", "category", *features)
    tables = {f"{d}_{part}": torch.randn(10, WIDTH, dtype=torch.float64) for d in LISTS for part in parts}
    categories = {d: [[i % 4 for i in row] for row in of] for d, of in LISTS.items()}
    histories = {d: history(of, categories[d]) for d, of in LISTS.items()}
    names = ("user", *tables, *(f"user_user {column}" for column in features))
    embedded = {f: torch.randn(rows, WIDTH, dtype=torch.float64) for f in names}
    for d, of in histories.items():
        embedded[f"{d}_history_item"] = tables[f"{d}_item"][of.item]
        embedded[f"{d}_history_category"] = tables[f"{d}_category"][of.category]
        embedded |= {f"{d}_history_{column}": tables[f"{d}_{column}"][of.item] for column in features}
    return tables, embedded, SimpleNamespace(label=None, source_label=None, histories=histories, source_before=None)


def by_hand(model, tables, embedded, features=()):
    """Logits, row by row and position by position."""

    def item_of(d, i):
        of_item = [tables[f"{d}_{column}"][i] for column in features]
        return torch.cat([tables[f"{d}_item"][i], tables[f"{d}_category"][i % 4], *of_item])

    p = dict(model.named_parameters())
    target, source = [], []
    for row in range(len(embedded["user"])):
        user = torch.cat([embedded[name][row] for name in ("user", *(f"user_user {c}" for c in features))])
        parts = ("item", "category", *features)
        item = {d: torch.cat([embedded[f"{d}_{part}"][row] for part in parts]) for d in LISTS}
        q, found = item["target"], {"user": user}
        for d in ("target", "source") if model.source else ("target",):
            name = f"{d}_attention"
            rows = [item_of(d, i) for i in LISTS[d][row // COPIES]]
            scores = []
            for r in rows:
                moved = r
                if d == "source":
                    moved = p[f"{name}.transfer.1.weight"] @ (p[f"{name}.transfer.0.weight"] @ r)
                hidden = p[f"{name}.of_item.weight"] @ r + p[f"{name}.of_candidate.weight"] @ q
                hidden = hidden + p[f"{name}.of_user.weight"] @ user + p[f"{name}.of_product.weight"] @ (moved * q)
                scores.append(p[f"{name}.out.weight"][0] @ hidden.relu())
            share = torch.stack(scores).softmax(0) if rows else []
            found[d] = sum((a * r for a, r in zip(share, rows, strict=True)), torch.zeros_like(q))
        z = torch.cat([q, *found.values()])
        parts = [q]
        for name, of in found.items():
            weight = p[f"interest.{name}.out.weight"][0] @ (p[f"interest.{name}.seen.weight"] @ z).relu()
            parts.append((weight + p[f"interest.{name}.bias"]).exp() * of)
        target.append(tower(p, "target", torch.cat(parts)))
        if model.source:
            source.append(tower(p, "source", torch.cat([item["source"], user])))
    return torch.stack(target), torch.stack(source) if source else None


def tower(p, domain, x):
    for layer in (0, 2):
        x = (p[f"{domain}_tower.{layer}.weight"] @ x).relu()
    return p[f"{domain}_head.weight"][0] @ x


@pytest.mark.parametrize("features", [(), ("brand", "title")], ids=["ids", "columns"])
@pytest.mark.parametrize("source", [True, False])
def test_logits_are_those_of_a_plain_loop(source, features):
    model, (tables, embedded, batch) = random_model(source, features), random_rows(features=features)
    found, (target, of_source) = model(embedded, batch), by_hand(model, tables, embedded, features)
    torch.testing.assert_close(found.target_logit, target)
    assert (found.source_logit is None) == (not source)
    if source:
        torch.testing.assert_close(found.source_logit, of_source)


def test_attention_without_scores_is_the_mean_and_an_empty_history_is_zero():
    model, (tables, embedded, batch) = random_model(), random_rows()
    torch.nn.init.zeros_(model.target_attention.out.weight)
    items = torch.cat([embedded["target_history_item"], embedded["target_history_category"]], dim=1)
    q = torch.cat([embedded["target_item"], embedded["target_category"]], dim=1)
    found = model.target_attention(items, batch.histories["target"], q, embedded["user"])
    for row, of in enumerate(found):
        ids = LISTS["target"][row // COPIES]
        rows = [torch.cat([tables["target_item"][i], tables["target_category"][i % 4]]) for i in ids]
        torch.testing.assert_close(of, torch.stack(rows).mean(0) if rows else torch.zeros(2 * WIDTH).double())


def test_at_first_interests_weigh_e_1_1_and_losses_are_ln_2():
    model, (_, embedded, batch) = MiNet(WIDTH), random_rows()
    initialise_dense(model, seed=8)
    model.double()
    z = torch.randn(4, model.interest["user"].seen.in_features, dtype=torch.float64)
    for name, first in (("user", 1.0), ("target", 0.0), ("source", 0.0)):
        torch.testing.assert_close(model.interest[name](z), torch.full((4, 1), first, dtype=torch.float64).exp())
    batch.label = batch.source_label = torch.tensor([1.0, 0.0] * 3)
    for loss in model.losses(model(embedded, batch), batch):
        torch.testing.assert_close(loss, torch.full((6,), 2.0, dtype=torch.float64).log())


def test_the_source_loss_alone_teaches_the_source_tower():
    model, (_, embedded, batch) = random_model(), random_rows()
    batch.label = batch.source_label = torch.tensor([1.0, 0.0] * 3)
    target, source = model.losses(model(embedded, batch), batch)
    names, parameters = zip(*model.named_parameters(), strict=True)
    of_target = torch.autograd.grad(target.sum(), parameters, allow_unused=True, retain_graph=True)
    of_source = torch.autograd.grad(source.sum(), parameters, allow_unused=True)
    assert {n for n, g in zip(names, of_source, strict=True) if g is not None} == {
        n for n in names if n.startswith(("source_tower", "source_head"))
    }
    assert all(
        (g is None) == n.startswith(("source_tower", "source_head")) for n, g in zip(names, of_target, strict=True)
    )
