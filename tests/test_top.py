"""The best items of every user, a block at a time, against sorting all of them."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cdr_dist.production.top import Top


def greedy(scores, allowed, category, top, most):
    """Best first, ties by the smaller item; at most `most` of a category where that is not 0."""
    found, counts = [], {}
    for item in sorted(np.flatnonzero(allowed).tolist(), key=lambda i: (-scores[i], i)):
        kind = category[item]
        if len(found) < top and (not most or counts.get(kind, 0) < most):
            counts[kind] = counts.get(kind, 0) + 1
            found.append(item)
    return found


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    users=st.integers(1, 5),
    items=st.integers(1, 40),
    top=st.integers(1, 8),
    most=st.integers(0, 3),
    block=st.integers(1, 12),
    values=st.sampled_from([2, 5, 1000]),
    own=st.booleans(),
)
def test_they_are_the_greedy_choice_of_all(seed, users, items, top, most, block, values, own):
    """values: few, so that many scores are equal."""
    random = np.random.default_rng(seed)
    scores = (random.integers(0, values, (users, items)) / 7).astype(np.float32)
    allowed = random.random((users, items)) < 0.8
    category = random.integers(0, 4, items).astype(np.int32)
    best, order = Top(users, top, most, category), random.permutation(items)
    for first in range(0, items, block):
        ids = order[first : first + block]
        offered = torch.from_numpy(np.where(allowed, scores, -np.inf)[:, ids])
        rows = torch.from_numpy(random.permutation(users))
        best.offer(rows, np.tile(ids, (users, 1)) if own else ids, offered[rows])
    bounds, found, of = best.of_users()
    for user in range(users):
        mine = found[bounds[user] : bounds[user + 1]].tolist()
        assert mine == greedy(scores[user], allowed[user], category, top, most)
        assert of[bounds[user] : bounds[user + 1]].tolist() == scores[user, mine].tolist()
    assert best.full(torch.arange(users)) == bool((np.diff(bounds) == top).all())
