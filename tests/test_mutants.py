"""The bugs that `make mutants` plants still fit the tree; whether each is found takes long and is not asked here."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_planted_bug_fits_the_tree():
    patches = sorted((ROOT / "tests" / "mutants").glob("*.patch"))
    assert len(patches) >= 20
    for patch in patches:
        tried = subprocess.run(["git", "apply", "--check", patch], cwd=ROOT, capture_output=True, text=True)
        assert tried.returncode == 0, tried.stderr
