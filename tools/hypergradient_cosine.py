"""How good is the K-term hypergradient? Its cosine with the converged one, along a training with BIAO.

    python tools/hypergradient_cosine.py data=demo
    python tools/hypergradient_cosine.py data=demo hypergradient.theta=[dense,tables] damping=0.1

In every `every`-th upper step (of at most `steps`) the hypergradient of that step's train and dev batch is computed
again in float64: by K terms of the Neumann series, K = 0, 1, 3, 10, and by conjugate gradients down to a residual of
1e-8 (at most `products` products). `damping` (a list with commas) is added to the Hessian's diagonal in all of them:
without it the Hessian has no inverse (a row's is of rank one for every row of the batch), and where theta has dense
layers it is not even positive. Steps in which conjugate gradients did not converge are counted and left out. Printed
for each damping: the mean and the least cosine of each K with the converged hypergradient, and the mean ratio of norms.
Any option of jobs/train.py may follow; the run's folder is thrown away.
"""

from __future__ import annotations

import copy
import math
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from cdr_dist.bilevel.hypergradient import Hypergradient, hypergradient
from cdr_dist.bilevel.options import HypergradientOptions
from cdr_dist.configuration import from_words
from cdr_dist.data.demo import dataset_of
from cdr_dist.data.words import apart
from cdr_dist.errors import UserError
from cdr_dist.evaluation.table import markdown
from cdr_dist.jobs import run_job
from cdr_dist.training.launch import train
from cdr_dist.training.upper import Upper

TERMS = (0, 1, 3, 10)
TOLERANCE = 1e-8
MEASURED = [
    "recipe=biao",
    "trainer.workers=0",
    "trainer.checkpoint_every=0",
    "evaluation.patience=0",
    "trainer.epochs=4",
]


@dataclass
class Plan:
    """What to measure, and what was found: damping -> K -> (cosine, ratio of norms) of the steps that converged."""

    dampings: list[float]
    every: int
    steps: int
    products: int
    found: dict[float, dict[int, list[tuple[float, float]]]] = field(default_factory=lambda: defaultdict(dict))
    products_made: dict[float, list[int]] = field(default_factory=lambda: defaultdict(list))
    seen: int = 0
    measured: int = 0


class Compared(Upper):
    """BIAO's upper step, beside which hypergradients are computed that nothing learns from."""

    plan: Plan  # the run ends before anybody could hand it over

    def _hypergradient(self, train: object, dev: object, options: HypergradientOptions) -> Hypergradient:
        plan = self.plan
        if plan.seen % plan.every == 0 and plan.measured < plan.steps:
            plan.measured += 1
            self._compare(train, dev, options)
        plan.seen += 1
        return super()._hypergradient(train, dev, options)  # type: ignore[arg-type]

    def _compare(self, train: object, dev: object, options: HypergradientOptions) -> None:
        s = self._session
        model, perceptron, head = (copy.deepcopy(m).double() for m in (s.model, self._perceptron, s.dev_head))

        def by(**how: object) -> tuple[Mapping[str, Tensor], Hypergradient]:
            chosen = replace(options, **how)  # type: ignore[arg-type]
            found = hypergradient(model, perceptron, head, s.tables, train, dev, chosen)  # type: ignore[arg-type]
            return found.phi, found

        for damping in self.plan.dampings:
            most = self.plan.products
            exact, made = by(inverse="conjugate_gradient", terms=most, tolerance=TOLERANCE, damping=damping)
            self.plan.products_made[damping].append(made.passes - 3)
            if float(made.norms[-1]) > TOLERANCE * float(made.norms[0]):
                continue
            for terms in TERMS:
                approximate, _ = by(inverse="neumann", terms=terms, damping=damping)
                self.plan.found[damping].setdefault(terms, []).append(against(approximate, exact))


def against(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> tuple[float, float]:
    """Cosine, and the first's norm over the second's."""
    a, b = (torch.cat([of[name].flatten() for name in sorted(other)]) for of in (one, other))
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0)), float(a.norm() / b.norm())


def table(plan: Plan) -> str:
    rows = []
    for damping in plan.dampings:
        found = plan.found[damping]
        steps = len(next(iter(found.values()), []))
        made = plan.products_made[damping]
        row = [f"{damping:g}", f"{steps} of {len(made)}", f"{sum(made) / max(len(made), 1):.0f}"]
        for terms in TERMS:
            values = found.get(terms, [])
            cosines, ratios = zip(*values, strict=True) if values else ((math.nan,), (math.nan,))
            row.append(f"{sum(cosines) / len(cosines):.3f} ({min(cosines):.3f}; {sum(ratios) / len(ratios):.2g})")
        rows.append(row)
    return markdown(["damping", "converged", "products", *(f"K = {k}" for k in TERMS)], rows)


def main(words: list[str]) -> None:
    defaults = {"damping": "0.001,0.01,0.1", "every": "20", "steps": "40", "products": "500"}
    own, rest = apart(words, defaults)
    try:
        dampings = [float(d) for d in own.pop("damping").split(",")]
        Compared.plan = Plan(dampings, **{name: int(value) for name, value in own.items()})
    except ValueError as error:
        raise UserError(f"damping, every, steps and products are numbers: {error}") from error
    cycle = (
        "{update:{_target_:cdr_dist.training.lower.Lower,"
        "weighting:{_target_:cdr_dist.training.weighting.Learned}},times:${upper.interval}},"
        "{update:{_target_:__main__.Compared}}"
    )
    with tempfile.TemporaryDirectory(prefix="hypergradient-cosine-") as folder:
        config = from_words([*MEASURED, f"recipe.phases=[{{name:train,cycle:[{cycle}]}}]", *rest, f"run={folder}/run"])
        train(config, dataset_of(config.data), quiet=True)
    print(f"{' '.join(words)}: mean cosine (least; mean ratio of norms) with the converged hypergradient\n")
    print(table(Compared.plan))


if __name__ == "__main__":
    sys.exit(run_job("hypergradient_cosine", __doc__, main))
