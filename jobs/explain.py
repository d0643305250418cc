"""Shows what the perceptron of a run's best checkpoint finds in source behaviours (Figure 6 of the BIAO paper).

    python jobs/explain.py run=runs/biao user=A1B2C3
    python jobs/explain.py run=runs/biao user=A1B2C3 html=page.html most=100000
    python jobs/explain.py run=runs/biao out=weights.parquet workers=4

user: one user's source behaviours by weight, beside both histories, as tables here and as a page of HTML that needs
nothing else: html, or RUN/explanations/USER.html. Each behaviour has its global part (gamma_1: what it is worth to
anybody), its local part (gamma_2: to this user), their product, the score, and a weight.

out: every user's behaviours as Parquet (user, item, category, label, timestamp, gamma_1, gamma_2, score, weight), found
by the run's trainer.workers unless workers says otherwise (0: this process).

A behaviour is scored next to the histories of its user's last training row. Its weight is relative: what it would be,
times the batch size, in a batch of typical behaviours, so that the mean over the dataset is gamma and joint training's
weights are all 1 (upper.gamma0). most: training rows from which the typical behaviour is taken; 20,000 with user, drawn
by the run's seed, and all of them with out, unless given.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdr_dist.jobs import run_job


def main(words: list[str]) -> None:
    from cdr_dist.training.explanation_job import explanation_job

    explanation_job(words)


if __name__ == "__main__":
    sys.exit(run_job("explain", __doc__, main))
