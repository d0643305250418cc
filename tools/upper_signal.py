"""How clearly does the hypergradient tell helpful source behaviours from harmful ones? On data with planted truth.

    python tools/upper_signal.py data=demo upper.source_draws=1
    python tools/upper_signal.py data=demo hypergradient.theta=[dense,tables] hypergradient.terms=3

Trains with BIAO's lower level and equal weights: the upper level computes hypergradients and learns nothing. In
every upper step it takes each behaviour's own part, - d L_dev / d w_j, and compares the mean over the helpful with
that over the harmful ones; the mean over all says whether the source should count more as a whole. Printed for each
fifth of the training: t of either over the fifth's steps (noise alone: 0 +- 1). Any option of jobs/train.py may
follow; the run's folder is thrown away.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from cdr_dist.bilevel.hypergradient import Hypergradient
from cdr_dist.configuration import from_words
from cdr_dist.data.batch import Batch
from cdr_dist.data.demo import dataset_of
from cdr_dist.data.truth import usefulness_by_category
from cdr_dist.jobs import run_job
from cdr_dist.training.launch import train
from cdr_dist.training.session import Session
from cdr_dist.training.upper import Upper

PARTS = 5
MEASURED = [
    "recipe=biao",
    "trainer.workers=0",
    "trainer.checkpoint_every=0",
    "evaluation.patience=0",
    "evaluation.every=1000000",
    "trainer.epochs=8",
]


class Measured(Upper):
    """Keeps, of every upper step, how much more the helpful behaviours help than the harmful ones, and all of them."""

    found: list[tuple[float, float]] = []  # noqa: RUF012  the run ends before anybody could hand a list over

    def bind(self, session: Session) -> None:
        super().bind(session)
        self._kinds = usefulness_by_category(session.folder, session.manifest)

    def learn(self, found: Hypergradient, train: Batch) -> float:
        assert found.by_behaviour is not None, "perceptron.item_gradient leaves behaviours without a part of their own"
        kinds = [self._kinds[c] for c in train.train["source_category"].values().tolist()]
        of = {
            kind: found.by_behaviour[torch.tensor([k == kind for k in kinds]) & train.source_valid]
            for kind in ("helpful", "harmful")
        }
        if all(len(values) for values in of.values()):
            level = -float(found.by_behaviour[train.source_valid].mean())
            Measured.found.append((float(of["harmful"].mean() - of["helpful"].mean()), level))
        return 0.0


def t_value(values: torch.Tensor) -> float:
    return float(values.mean() / values.std() * len(values) ** 0.5)


def main(words: list[str]) -> None:
    cycle = (
        "{update:{_target_:cdr_dist.training.lower.Lower,"
        "weighting:{_target_:cdr_dist.training.weighting.Learned}},times:${upper.interval}},"
        "{update:{_target_:__main__.Measured}}"
    )
    with tempfile.TemporaryDirectory(prefix="upper-signal-") as folder:
        config = from_words([*MEASURED, f"recipe.phases=[{{name:train,cycle:[{cycle}]}}]", *words, f"run={folder}/run"])
        train(config, dataset_of(config.data), quiet=True)
    bounds = [round(i * len(Measured.found) / PARTS) for i in range(PARTS + 1)]
    print(f"{' '.join(words)}: t by fifth of {len(Measured.found)} upper steps, and over all")
    for name, column in zip(("helpful - harmful", "all"), torch.tensor(Measured.found).double().T, strict=True):
        parts = " ".join(f"{t_value(column[a:b]):5.1f}" for a, b in itertools.pairwise(bounds))
        print(f"  {name:18s}{parts}  {t_value(column):5.1f}")


if __name__ == "__main__":
    sys.exit(run_job("upper_signal", __doc__, main))
