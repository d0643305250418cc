"""Ranks by matrix products, against counting; whole numbers as scores, so that there is no rounding in either."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cdr_dist.errors import UserError
from cdr_dist.evaluation.metrics import gains_at_ranks
from cdr_dist.models.pairs import ByProduct, DotProduct, pair_scorer
from cdr_dist.training import product_ranks as module
from cdr_dist.training.product_ranks import ranks_by_product
from tests.problem import replaced

DOT = DotProduct(lambda embedded, _: embedded["row"], lambda embedded: embedded["item"])
NONE = (np.zeros(0, dtype=np.int64),) * 2


def ranks(rows, items, column, barred=NONE, most=1 << 30, parts=1, own=None):
    own = torch.zeros(len(rows)) if own is None else own
    return ranks_by_product(DOT, rows, own, np.asarray(column), barred, lambda: items.tensor_split(parts), most)


@pytest.mark.parametrize(("tile", "parts"), [((3, 5), 4), ((576, 1152), 1)])
def test_counts_are_those_of_a_double_loop(tile, parts):
    generator = np.random.default_rng(3)
    rows, items = generator.integers(-2, 3, (50, 4)), generator.integers(-2, 3, (40, 4))
    column = generator.integers(-1, 40, 50)  # -1: an item that is not among them
    own = torch.from_numpy(generator.integers(-3, 4, 50)).float()
    barred = generator.integers(0, 50, 200), generator.integers(-1, 40, 200)
    above, tied = np.zeros(50, dtype=int), np.ones(50, dtype=int)
    out = set(zip(*map(np.ndarray.tolist, barred), strict=True))
    for i in range(50):
        mine = rows[i] @ items[column[i]] if column[i] >= 0 else float(own[i])
        for j in range(40):
            if j != column[i] and (i, j) not in out:
                above[i] += rows[i] @ items[j] > mine
                tied[i] += rows[i] @ items[j] == mine
    with replaced(module, "TILE_ROWS", tile[0]), replaced(module, "TILE_ITEMS", tile[1]):
        floats = torch.from_numpy(rows).float(), torch.from_numpy(items).float()
        found = ranks(*floats, column, barred, parts=parts, own=own)
        settled, _ = ranks(*floats, column, barred, most=5, parts=parts, own=own)
    assert found[0].tolist() == above.tolist()
    assert found[1].tolist() == tied.tolist()
    assert np.minimum(settled, 5).tolist() == np.minimum(above, 5).tolist()


@pytest.mark.parametrize("width", [5, 13, 64, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_items_with_equal_rows_tie_wherever_they_stand(width, dtype):
    """Three kinds of items, in every place of full and of filled tiles."""
    generator = torch.Generator().manual_seed(width)
    kinds, kind = torch.randn(3, width, generator=generator, dtype=dtype), torch.arange(1700) % 3
    rows = torch.randn(700, width, generator=generator, dtype=dtype)
    column = torch.randint(1700, (700,), generator=generator)
    above, tied = ranks(rows, kinds[kind], column, own=torch.zeros(700, dtype=dtype))
    of_kind = torch.bincount(kind)
    assert tied.tolist() == of_kind[kind[column]].tolist()
    assert set(above.tolist()) <= {0, *of_kind.tolist(), *(1700 - of_kind).tolist()}


def test_a_constant_scorer_gets_the_expectation_of_a_random_one():
    above, tied = ranks(torch.zeros(30, 8), torch.randn(200, 8), np.arange(30))
    found = gains_at_ranks(above.numpy(), tied.numpy(), [5])
    assert found["hr@5"] == pytest.approx(5 / 200)
    assert found["mrr@5"] == pytest.approx(sum(1 / r for r in range(1, 6)) / 200)


def test_scores_that_are_not_finite_are_named_and_what_does_not_count_may_be():
    items = torch.ones(20, 3)
    items[7, 0] = torch.inf
    barred = np.arange(4), np.full(4, 7)
    ranks(torch.ones(4, 3), items, np.zeros(4, dtype=int), barred)
    with pytest.raises(UserError, match="scores are not finite"):
        ranks(torch.ones(4, 3), items, np.zeros(4, dtype=int), (barred[0][1:], barred[1][1:]))


def test_matrix_factorisation_is_a_product():
    from cdr_dist.models.mf import MatrixFactorisation

    model = MatrixFactorisation(6)
    torch.nn.init.constant_(model.bias, 0.7)
    user, item = torch.randn(5, 6), torch.randn(7, 6)
    scorer = pair_scorer(model)
    assert isinstance(scorer, ByProduct)
    with torch.no_grad():
        part, of_item = scorer.row_part({"user": user}, None), scorer.item_part({"target_item": item})
        for i in range(5):
            given = {"user": user[i].expand(7, -1), "target_item": item}
            expected = model(given, None).target_logit
            torch.testing.assert_close(scorer.matrix(part, of_item)[i], expected)
            torch.testing.assert_close(scorer.logits(part[i], of_item), expected)
