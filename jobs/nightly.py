"""A night: new logs in, and a model that is better, or at least not worse, published.

    python jobs/nightly.py date=2026-11-24 config=nightly.yaml
    python jobs/nightly.py date=2026-11-24 source=s3://logs/books/{date}/ target=s3://logs/films/{date}/ \\
        labels=sampled out=s3://models/films recipe=biao gate.drop=0.002
    python jobs/nightly.py date=2026-11-24 config=nightly.yaml --check

The logs of `window` days up to the date become a dataset on top of the newest one (ids stay); a run starts from the
published model's parameters; both are measured on the date's own rows; if the gate lets it, latest.json is switched to
the new run, else the old one stays and the output says why. The same command goes on after a crash, and says so where
the night is over. A date that was missed may be made up for at any time: it is measured, and never replaces a later
model. Any option of jobs/prepare.py and jobs/train.py may be given; config holds them as YAML.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdr_dist.jobs import run_job


def main(words: list[str]) -> None:
    from cdr_dist.production.nightly_job import nightly_job

    nightly_job([w for w in words if w != "--check"], only_check="--check" in words)


def describe() -> str:
    from cdr_dist.data.words import described, fields_of
    from cdr_dist.production.options import NightlyOptions

    return "Options:\n" + "\n".join(described(fields_of(NightlyOptions), ("date", "out")))


if __name__ == "__main__":
    sys.exit(run_job("nightly", __doc__, main, describe))
