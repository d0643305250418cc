"""From a policy's say to gates: hard, soft, by reinforcement, at random (UAF, section 3.3).

The difference of two Gumbel draws is one logistic draw, so a choice between two takes one number.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from cdr_dist.errors import UserError

LOGITS = ("log_pi", "sigmoid")
REWARDS = ("paper", "released")
BASELINES = ("greedy", "sample")


@dataclass(frozen=True)
class Gates:
    """tuned [n, blocks]: the share of the fine-tuned copy; the frozen block has the rest."""

    tuned: Tensor
    learns: bool = False

    def baseline(self) -> Gates:
        raise AssertionError("only what learns by reinforcement has one")

    def policy_loss(self, right: Tensor, baseline_right: Tensor) -> Tensor:
        raise AssertionError("only what learns by reinforcement has one")


class Hard:
    """One or the other, by Gumbel softmax of temperature tau, straight through (eq. 9-10); greedy in evaluation.

    logits: log_pi, of the softmax of the policy's two numbers, or sigmoid of each number (released), which keeps the
    probability of fine-tuning within [.269, .731].
    """

    draws, fixed_draws, needs_policy, needs_truth = 1, False, True, False

    def __init__(self, temperature: float = 10.0, logits: str = "log_pi") -> None:
        if not temperature > 0:
            raise UserError(f"recipe.transfer.decision.temperature={temperature}: must be above 0")
        _one_of("logits", logits, LOGITS)
        self._temperature, self._sigmoid = temperature, logits == "sigmoid"

    def gates(self, say: Tensor, draws: Tensor, training: bool) -> Gates:
        gap = _gap(say.sigmoid() if self._sigmoid else say)
        if not training:
            return Gates((gap > 0).to(say.dtype))
        gap = gap + torch.logit(draws)
        relaxed = torch.sigmoid(gap / self._temperature)
        return Gates((gap > 0).to(say.dtype) + (relaxed - relaxed.detach()))


class Soft:
    """The sigmoid of the policy's say (eq. 12), which is the difference of its two numbers."""

    draws, fixed_draws, needs_policy, needs_truth = 0, False, True, False

    def gates(self, say: Tensor, draws: Tensor, training: bool) -> Gates:
        return Gates(torch.sigmoid(_gap(say)))


class Random:
    """A fair coin for every block; `fixed`: the same one for a user in training and evaluation (the paper's), else
    another for every epoch."""

    draws, needs_policy, needs_truth = 1, False, False

    def __init__(self, fixed: bool = True) -> None:
        self.fixed_draws = fixed

    def gates(self, say: Tensor, draws: Tensor, training: bool) -> Gates:
        return Gates((draws < 0.5).to(say.dtype))


class Planted(Random):
    """Planted sequences only: contrary users take the fine-tuned copy of every block, aligned ones the frozen block."""

    needs_truth = True


class Reinforced:
    """Self-critical sequence training (eq. 13-15): the loss gets beta times -log p(A) (R(A) - R(baseline)).

    reward of a right recommendation, s being the share of fine-tuned blocks: 1 - s^2 (paper), 1 - gamma (1 - s)^2
    (released); of a wrong one: -gamma. A recommendation is right where the positive stands above its
    negatives, of a rated row where the sign of its logit is that of its label.
    baseline: greedy, or a second sample (released). Evaluation is greedy.
    """

    fixed_draws, needs_policy, needs_truth = False, True, False

    def __init__(self, gamma: float = 1.0, beta: float = 1.0, reward: str = "paper", baseline: str = "greedy") -> None:
        _one_of("reward", reward, REWARDS)
        _one_of("baseline", baseline, BASELINES)
        self._gamma, self._beta, self._reward, self._baseline = gamma, beta, reward, baseline
        self.draws = 2 if baseline == "sample" else 1

    def gates(self, say: Tensor, draws: Tensor, training: bool) -> Gates:
        gap = _gap(say)
        greedy = (gap > 0).to(say.dtype)
        if not training:
            return Gates(greedy)
        probability = gap.detach().sigmoid()
        own, *other = draws.chunk(self.draws, dim=1)
        taken = (own < probability).to(say.dtype)
        against = (other[0] < probability).to(say.dtype) if other else greedy
        log_probability = (taken * functional.logsigmoid(gap) + (1 - taken) * functional.logsigmoid(-gap)).sum(1)
        return _Sampled(taken, True, against=against, log_probability=log_probability, of=self)

    def reward(self, tuned: Tensor, right: Tensor) -> Tensor:
        """Gates [n, blocks], bool [n] -> [n] (eq. 13)."""
        share = tuned.mean(1)
        of_right = 1 - share**2 if self._reward == "paper" else 1 - self._gamma * (1 - share) ** 2
        return torch.where(right, of_right, torch.full_like(share, -self._gamma))

    def loss(self, log_probability: Tensor, advantage: Tensor) -> Tensor:
        return -self._beta * log_probability * advantage


@dataclass(frozen=True)
class _Sampled(Gates):
    """against: the baseline's gates; log_probability [n]: of the chosen ones."""

    against: Tensor = field(kw_only=True)
    log_probability: Tensor = field(kw_only=True)
    of: Reinforced = field(kw_only=True)

    def baseline(self) -> Gates:
        return Gates(self.against)

    def policy_loss(self, right: Tensor, baseline_right: Tensor) -> Tensor:
        advantage = self.of.reward(self.tuned, right) - self.of.reward(self.against, baseline_right)
        return self.of.loss(self.log_probability, advantage)


def _gap(say: Tensor) -> Tensor:
    """What speaks for fine-tuning, less what speaks for freezing: log pi_1 - log pi_0."""
    return say[..., 1] - say[..., 0]


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"recipe.transfer.decision.{name}={value}: choose {' or '.join(known)}")
