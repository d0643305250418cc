"""What a source behaviour would weigh in a batch of typical behaviours: weights that do not depend on a batch.

In training a weight is a share of the global batch that the behaviour happens to be in (eq. 8). To compare behaviours
with one another, or a user with another, the batch is replaced by all behaviours of the dataset, each counted once:

    relative weight = gamma * mass(score) / mean of mass over the dataset's behaviours

with mass = exp for normalisation=softmax (so it is gamma * exp(score - log mean exp of all scores)) and softplus for
softplus: the weight times B that `BehaviouralPerceptron.weights` gives in a large batch drawn from the dataset's
behaviours. Over the dataset relative weights have the mean gamma; joint training's would all be gamma0. A sigmoid
weighs each behaviour for itself: the relative weight is weight times B, 2 gamma sigmoid(score), and has no given mean.

Training batches differ from this in two ways: a user comes as often as it has rows, and where labels are sampled some
source behaviours are drawn negatives. Neither changes the order of weights, nor the ratio of any two (not for sigmoid
either): both move only the mean that they are relative to.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from cdr_dist.bilevel.perceptron import BehaviouralPerceptron


def log_mass(score: Tensor, normalisation: str) -> Tensor:
    """Scores [n] -> log of what each counts before it is normalised, float64 [n]."""
    score = score.double()
    if normalisation == "softmax":
        return score
    if normalisation == "sigmoid":
        return functional.logsigmoid(score) + math.log(2)
    # log softplus(x) is x for very negative x, of which softplus itself would be 0
    return torch.where(score < -30, score, functional.softplus(score).log())


class LogMeanMass:
    """Log of the mean mass of all scores that were added; in float64, an order of additions fixes its bits."""

    def __init__(self, normalisation: str) -> None:
        self.normalisation = normalisation
        self.behaviours = 0
        self._total = torch.tensor(-torch.inf, dtype=torch.float64)

    def add(self, score: Tensor) -> None:
        if len(score):
            self._total = torch.logaddexp(self._total, log_mass(score, self.normalisation).logsumexp(0).cpu())
            self.behaviours += len(score)

    @property
    def value(self) -> float:
        """0 for sigmoid, which is relative to nothing."""
        assert self.behaviours, "no score was added"
        return 0.0 if self.normalisation == "sigmoid" else float(self._total) - math.log(self.behaviours)


@torch.no_grad()
def relative_weights(perceptron: BehaviouralPerceptron, score: Tensor, log_mean: float) -> Tensor:
    """Scores [n] -> relative weights, float64 [n]; log_mean: of a `LogMeanMass`."""
    return perceptron.gamma.double() * (log_mass(score, perceptron.options.normalisation) - log_mean).exp()
