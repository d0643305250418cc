"""Rows of all tables as one numbered stack, and as bags of one id."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cdr_dist.embeddings import stack as module
from cdr_dist.embeddings.stack import Stack, bags
from tests.problem import replaced

CPU = torch.device("cpu")


def test_a_number_names_owner_table_and_row():
    stack = Stack(["a", "b"], [4, 2], CPU)
    found = stack.numbers(torch.tensor([[0, 3, 4, 9], [0, 1, 2, 5]]), ["a", "b"])
    assert found.tolist() == [[0, 3, 6, 13], [4, 5, 10, 17]]  # worker w begins at 6 w, table b there at 4
    assert stack.table(found % stack.total).tolist() == [[0] * 4, [1] * 4]


@settings(deadline=None)  # the first one compiles
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data(), st.sampled_from([0, 1]))
def test_bags_hold_every_asked_row_but_padding_in_its_place(rows, data, worker):
    """Against lists written down row by row; the loop for CPUs and the operators for devices agree."""
    stack = Stack([str(i) for i in range(len(rows))], rows, CPU)
    asked = data.draw(st.lists(st.integers(0, sum(rows) - 1), min_size=1, max_size=12))
    names = [(t, i) for t, count in enumerate(rows) for i in range(count)]
    wanted = [[names[one][1] for one in asked if names[one][0] == t] for t in range(len(rows))]
    longest = max(map(len, wanted))
    with replaced(module, "rank", lambda: worker):
        looped = bags(torch.tensor(asked), stack)
        device = module._bags_on_device(torch.tensor(asked), stack, worker == 0)
    for found in (looped, device):
        parts = np.split(found.ids.numpy(), found.offsets[1:-1].numpy())
        assert len(parts) == len(rows) * longest
        held = [list(p) for p in parts]
        for t, of in enumerate(wanted):
            bags_of = [[i] if i or worker else [] for i in of] + [[]] * (longest - len(of))
            assert held[t * longest : (t + 1) * longest] == bags_of
        # The pooled kernel gives [longest, tables], the other one a row for every id and one of padding.
        pooled = [held[t * longest + slot] for slot in range(longest) for t in range(len(rows))]
        single = [[i] for i in found.ids.tolist()] + [[]]
        for one, at, place in zip(asked, found.side_by_side.tolist(), found.in_order.tolist(), strict=True):
            row = names[one][1]
            assert pooled[at] == single[place] == ([row] if row or worker else [])
