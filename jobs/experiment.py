"""Runs data x models x methods x seeds and reports on them: table.md, report.html and figures in the folder `out`.

    python jobs/experiment.py experiment=demo seeds=5
    python jobs/experiment.py experiment=table1 data=data/books-films,data/books-toys seeds=5 models=conet,minet
    python jobs/experiment.py experiment=table1 data=data/books-films budget=12      # rates chosen on validation first

experiment  a file of configs/experiment/ (below)
data        prepared datasets, with commas; each is called by its folder's name
methods, models   some of the file's (all); a model may be any file of configs/model/
seeds (5), first_seed (8)   trainings of each, from which on
budget      trials of the file's search for every method, data and model, on the seed before first_seed; 0: none
parallel    runs at a time (auto: as many as there are cores and memory for)
out         folder of the report (runs/experiments/NAME)
runs        folder of the runs (OUT/runs), local or s3://; experiments with the same one share the runs they both have
paper       scenarios of the paper to list beside other data, such as books_toys

Any other key=value goes to every run, as in jobs/train.py. Finished runs are not run again. A run that fails does not
end the others; exit code 1, or 2 where all failed by a mistake of yours. With RAY_ADDRESS set, runs are tasks of that
cluster: `data` and `runs` must then be folders that all of its machines share, or s3://.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdr_dist.jobs import run_job


def main(words: list[str]) -> int:
    from cdr_dist.training.experiment_job import experiment_job

    return experiment_job(words)


def experiments() -> str:
    """Every experiment with the first line of its file."""
    files = sorted((Path(__file__).resolve().parent.parent / "configs" / "experiment").glob("*.yaml"))
    width = max(len(file.stem) for file in files)
    return "Experiments:\n" + "\n".join(
        f"  {file.stem:{width}}  {file.read_text().splitlines()[0].removeprefix('# ')}" for file in files
    )


if __name__ == "__main__":
    sys.exit(run_job("experiment", __doc__, main, experiments))
