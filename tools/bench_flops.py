"""FLOPs of our steps, for their share of the roofline: of matrix products, the fewest that do the job."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cdr_dist.bilevel.perceptron import BehaviouralPerceptron
from cdr_dist.configuration import TrainConfig
from cdr_dist.data.histories import History
from cdr_dist.training.session import Session

BACKWARD = 2.0
"""Of a forward pass: products for the gradients of inputs (down to the rows) and of weights."""


def conet_flops(config: TrainConfig) -> float:
    """A row's forward pass: both towers as one, the user's part, which both read, once."""
    first, *rest = config.model["hidden"]
    towers = 5 * config.tables.width * 2 * first + sum(4 * a * b for a, b in itertools.pairwise([first, *rest]))
    return 2.0 * (towers + 2 * [first, *rest][-1])


def perceptron_flops(perceptron: BehaviouralPerceptron, histories: Mapping[str, History], rows: int) -> float:
    """A batch's forward pass, factored, from its histories' own lengths: nothing is filled up, no exponentials."""
    width, heads = perceptron.global_mlp[0].in_features // 2, perceptron.options.heads
    inner = heads * width
    layers = [x for x in (*perceptron.global_mlp, *perceptron.local_mlp) if isinstance(x, nn.Linear)]
    total = 2.0 * rows * sum(x.in_features * x.out_features for x in layers)
    for of in histories.values():
        n, copies = of.lengths.double(), rows / len(of.lengths)
        total += 2 * 2 * width * inner * (3 * len(of.item) + 2 * rows)  # query, key, value; the source's query, value
        total += 2 * inner * float(n.square().sum())  # scores, which copies share
        total += copies * (4 * heads * float(n.square().sum()) + 4 * inner * float(n.sum()))  # softmax's sums, pooling
    return total


def lower_flops(session: Session) -> float:
    """A worker's lower step on its next batch: the perceptron, where there is one, goes forward only."""
    batch = session.lower.peek().batch
    total = (1 + BACKWARD) * len(batch) * conet_flops(session.config)
    if session.perceptron is not None:
        total += perceptron_flops(session.perceptron, batch.histories, len(batch))
    return total


def counted_flops(call: Callable[[], Any]) -> float:
    """Of one call, as torch counts them: without those of compiled loops."""
    with _Counter() as counter:
        call()
    return counter.total


class _Counter(TorchDispatchMode):
    """torch's FlopCounterMode tells modules apart by hooks, which a second derivative cannot go through."""

    total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out
