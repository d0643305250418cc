"""Plants one bug after the other into a copy of the tree and sees whether the fault tests notice.

    python tools/mutants.py               # all of tests/mutants/*.patch
    python tools/mutants.py lost-fsync    # those whose name holds the word

Every patch changes a line of ours. The tests that must fail run first on the tree as it is, where they must pass.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdr_dist.errors import UserError
from cdr_dist.evaluation.table import markdown
from cdr_dist.jobs import run_job

ROOT = Path(__file__).resolve().parent.parent
PATCHES = ROOT / "tests" / "mutants"
HARNESS = ["tests/test_histories.py", "tests/test_checkpoint.py", "tests/test_crashes.py"]
SECONDS = 900
"""A run of the harness that takes longer has hung, which is noticed, too."""


def noticed(tree: Path) -> bool:
    """Whether a test of the harness fails on this tree."""
    given = os.environ | {"PYTHONPATH": str(tree), "CDR_HISTORIES": os.environ.get("CDR_HISTORIES", "300")}
    words = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", *HARNESS]
    with tempfile.TemporaryFile() as screen:
        process = subprocess.Popen(words, cwd=tree, env=given, stdout=screen, stderr=screen)
        try:
            code = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return True
    if code not in (0, 1):
        raise UserError(f"pytest ended with {code} in a copy of the tree")
    return code == 1


def copied(into: Path) -> Path:
    """What git knows of the tree, as it is now."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, names.decode().split("\0")):
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, into / name)
    return into


def main(words: list[str]) -> None:
    patches = [p for p in sorted(PATCHES.glob("*.patch")) if not words or any(w in p.name for w in words)]
    if not patches:
        raise UserError(f"no patch in {PATCHES} is named like {' or '.join(words)}")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        if noticed(copied(Path(folder))):
            raise UserError("the harness fails on the tree as it is")
    rows, missed = [], []
    for patch in patches:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            tree = copied(Path(folder))
            subprocess.run(["git", "apply", str(patch)], cwd=tree, check=True)
            found = noticed(tree)
        rows.append([patch.stem, "found" if found else "MISSED", f"{time.monotonic() - start:.0f} s"])
        print(*rows[-1], flush=True)
        if not found:
            missed.append(patch.stem)
    print("\n" + markdown(["planted bug", "", "after"], rows))
    if missed:
        raise UserError(f"{len(missed)} of {len(patches)} planted bugs went unnoticed: {', '.join(missed)}")
    print(f"\n{len(patches)} of {len(patches)} found")


if __name__ == "__main__":
    sys.exit(run_job("mutants", __doc__, main))
