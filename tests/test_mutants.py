"""The bugs that `make mutants` plants still fit the tree; whether each is found takes long and is not asked here."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tools.mutants import Planted

ROOT = Path(__file__).parents[1]


def test_every_planted_bug_fits_the_tree():
    patches = sorted((ROOT / "tests" / "mutants").glob("*.patch"))
    assert len(patches) >= 20
    for patch in patches:
        tried = subprocess.run(["git", "apply", "--check", patch], cwd=ROOT, capture_output=True, text=True)
        assert tried.returncode == 0, tried.stderr


def test_every_planted_bug_names_a_test_that_is_there():
    for patch in (ROOT / "tests" / "mutants").glob("*.patch"):
        for test in Planted.read(patch).first:
            file, _, name = test.partition("::")
            assert not name or f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), f"{patch.name}: {test}"
        assert Planted.read(patch).first, patch
