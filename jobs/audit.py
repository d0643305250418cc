"""Should I transfer, what, and from where? Compares the best models with and without a source, all of them tuned alike.

    python jobs/audit.py source=books.tsv.gz target=toys.tsv.gz labels=sampled out=runs/audit-toys
    python jobs/audit.py source=books.tsv.gz,cds.tsv.gz target=toys.tsv.gz labels=sampled seeds=5 budget=12
    python jobs/audit.py data=data/books-toys,data/cds-toys          # datasets of jobs/prepare.py, of users=target

source, target  raw logs, with any option of jobs/prepare.py; several sources with commas, also tried together
data            prepared datasets instead, with commas, of the same target
model           backbone of transfer and of the single-domain variant (conet)
seeds (3), first_seed (8)   trainings of each tuned method
budget (6)      trials of a search on validation data, for every method
parallel        runs at a time (auto)
out             folder of audit.md, audit.json, datasets and runs (runs/audit); on a cluster one that all machines share

The answer is about all users of the target, those of no source included (users=both asks of the others alone). Any
other key=value goes to every run, as in jobs/train.py. The same command goes on where it stopped. "No" is an answer:
then the single-domain model is the one to train.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdr_dist.jobs import run_job


def main(words: list[str]) -> None:
    from cdr_dist.training.audit import audit_job

    audit_job(words)


if __name__ == "__main__":
    sys.exit(run_job("audit", __doc__, main))
