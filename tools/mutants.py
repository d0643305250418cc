"""Plants one bug after the other into a copy of the tree and sees whether the fault tests notice.

    python tools/mutants.py               # all of tests/mutants/*.patch, two at a time
    python tools/mutants.py lost-fsync    # those whose name holds the word

Every patch changes a line of ours. Lines before it say `tests: …`, where it is looked for first (then in all of
HARNESS), and `hangs`, where a test that does not end is what must be seen. A bug counts as found when a test fails, and
fails again; all of these tests pass on the tree as it is, which is tried, too.
"""

from __future__ import annotations

import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdr_dist.errors import UserError
from cdr_dist.evaluation.table import markdown
from cdr_dist.jobs import run_job

ROOT = Path(__file__).resolve().parent.parent
PATCHES = ROOT / "tests" / "mutants"
HARNESS = ["tests/test_histories.py", "tests/test_checkpoint.py", "tests/test_crashes.py"]
AT_ONCE = 2
SECONDS = 900
"""Of one run of pytest."""
HUNG = "(no end)"


@dataclass(frozen=True)
class Planted:
    """A patch and what stands before it."""

    name: str
    path: Path
    first: list[str]
    hangs: bool

    @staticmethod
    def read(path: Path) -> Planted:
        head = path.read_text().split("--- a/")[0]
        tests = re.search(r"^tests: (.+)$", head, re.MULTILINE)
        return Planted(
            path.stem, path, tests[1].split() if tests else [], bool(re.search("^hangs", head, re.MULTILINE))
        )

    def tests(self) -> list[list[str]]:
        """What to run, one after the other until something fails."""
        rest = [file for file in HARNESS if file not in self.first]
        return [some for some in (self.first, rest) if some]


def failing(tree: Path, tests: list[str]) -> str:
    """The first test that fails on this tree, HUNG where none ends, "" where all pass."""
    given = os.environ | {"PYTHONPATH": str(tree), "CDR_SHRINK": "0"}
    given.setdefault("CDR_HISTORIES", "300")
    words = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run([*words, *tests], cwd=tree, env=given, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return HUNG
    if done.returncode == 0:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) (tests/\S+\.py(?:::\w+(?:\[[^\]]*\])?)?)", done.stdout, re.MULTILINE)
    if done.returncode != 1 or found is None:
        raise UserError(f"pytest ended with {done.returncode} in a copy of the tree: {done.stdout[-500:]}{done.stderr}")
    return found[1]


def finder(tree: Path, planted: Planted) -> str:
    """The test that notices the bug, twice; "" where none does."""
    for tests in planted.tests():
        for _ in range(2):  # a test that fails once only says nothing, and may have hidden the one that would
            found = failing(tree, tests)
            if not found:
                break
            if found == HUNG:
                if planted.hangs:
                    return found
                break
            if failing(tree, [found]):
                return found
    return ""


def copied(into: Path) -> Path:
    """What git knows of the tree, as it is now."""
    known = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(known, cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, names.decode().split("\0")):
        if (ROOT / name).is_file():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name)
    return into


def main(words: list[str]) -> None:
    patches = [p for p in sorted(PATCHES.glob("*.patch")) if not words or any(w in p.name for w in words)]
    if not patches:
        raise UserError(f"no patch in {PATCHES} is named like {' or '.join(words)}")
    all_planted = [Planted.read(p) for p in patches]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(AT_ONCE):  # each for one bug after the other: what is compiled is compiled once
            trees.put(copied(Path(folder) / str(number)))

        def tried(planted: Planted | None) -> tuple[str, float]:
            tree, start = trees.get(), time.monotonic()
            try:
                if planted is None:
                    return failing(tree, asked), time.monotonic() - start
                subprocess.run(["git", "apply", planted.path], cwd=tree, check=True)
                found = finder(tree, planted)
                subprocess.run(["git", "apply", "-R", planted.path], cwd=tree, check=True)
                seconds = time.monotonic() - start
                print(planted.name, found or "MISSED", f"{seconds:.0f} s", flush=True)
                return found, seconds
            finally:
                trees.put(tree)

        asked = list(dict.fromkeys(test for planted in all_planted for test in planted.first)) or HARNESS
        clean = pool.submit(tried, None)
        results = list(pool.map(tried, all_planted))
        if broken := clean.result()[0]:
            raise UserError(f"{broken} fails on the tree as it is")
    rows = [[p.name, found or "MISSED", f"{s:.0f} s"] for p, (found, s) in zip(all_planted, results, strict=True)]
    print("\n" + markdown(["planted bug", "found by", "after"], rows))
    missed = [p.name for p, (found, _) in zip(all_planted, results, strict=True) if not found]
    print(f"\n{len(rows) - len(missed)} of {len(rows)} found")
    if missed:
        raise UserError(f"unnoticed: {', '.join(missed)}")


if __name__ == "__main__":
    sys.exit(run_job("mutants", __doc__, main))
