"""Makes a job that runs from one of the suspended templates prepare, train, evaluate, recommend.

    kubectl -n cdr-dist get rayjob train -o json |
        python k8s/start.py name=biao-8 seed=8 run=s3://cdr/runs/biao-8 | kubectl create -f -

Words replace those of the same key in the template's command; others are added to it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "base" / "nightly"))

from create_rayjob import made_from


def main(words: list[str]) -> int:
    names = [word[5:] for word in words if word.startswith("name=")]
    if len(names) != 1 or not all("=" in word for word in words):
        print(__doc__.strip())
        return 2
    job = made_from(json.load(sys.stdin), names[0], [word for word in words if not word.startswith("name=")])
    json.dump(job, sys.stdout, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
