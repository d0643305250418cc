"""docs/tutorial.md, typed from first line to last: every block runs, and prints what it shows, up to numbers."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.forks import python

ROOT = Path(__file__).resolve().parent.parent
GENRES = "crime|history|music|romance|space|war|baking|gardening|tax"


def test_every_block_of_the_tutorial_runs_and_prints_what_it_shows(tmp_path):
    for name in ("jobs", "configs", "cdr_dist", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    printed, shown = "", 0
    for kind, block in re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "docs/tutorial.md").read_text(), re.M | re.S):
        if kind == "sh":
            printed = "".join(typed(line, tmp_path) for line in block.replace("\\\n", "").splitlines())
        elif kind == "text":
            assert missing(block, printed) is None, f"'{missing(block, printed)}' is not in\n{printed}"
            shown += 1
        else:
            path = tmp_path / re.match(r"# (tutorial/\S+)\n", block).group(1)
            path.parent.mkdir(exist_ok=True)
            path.write_text(block)
    assert shown == 9
    found = {recipe: summary(tmp_path, recipe) for recipe in ("target_only", "joint", "biao")}
    assert found["target_only"] + 0.02 < found["joint"], "the books help, the tutorial says"
    assert found["target_only"] + 0.02 < found["biao"]
    assert not {path.name for path in tmp_path.iterdir()} - {"tutorial", "jobs", "configs", "cdr_dist", "tools"}


def test_another_output_than_the_tutorial_shows_is_noticed():
    block = "a: 0.12 of 7; …/tutorial/a\n…\n| crime-film-1 | war * | ### |\n"
    assert missing(block, "b\na: 3 of 4; /tmp/x/tutorial/a\nother\n| tax-film-2 |  tax | # |\n") is None
    assert missing(block, "a: 3 of 4; /tmp/x/tutorial/a\n") == "| crime-film-1 | war * | ### |"
    assert missing(block, "a: 3 in 4; /tmp/x/tutorial/a\n| tax-film-2 |  tax | # |\n").startswith("a: 0.12")
    assert missing(block, "| tax-film-2 | tax | # |\na: 3 of 4; /tmp/x/tutorial/a\n") is not None, "order"


def typed(line, folder):
    """What a command prints. Jobs are forked, all else is run by a shell."""
    if not line.startswith("python jobs/"):
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        ended = subprocess.run(
            ["bash", "-ec", line], cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout
    ended = python(shlex.split(line)[1:], folder)
    printed = ended.out + ended.error
    assert ended.code == 0, f"{line}\n{printed}"
    return printed


def missing(block, printed):
    """The first line of a block that is not among those printed, in order; None: all are. …: more may stand here."""
    rest = iter([masked(line) for line in printed.splitlines()])
    for line in block.splitlines():
        begins = re.compile(re.escape(masked(line)).replace("…", ".*"))
        if line != "…" and not any(begins.fullmatch(other) for other in rest):
            return line
    return None


def masked(line):
    """Without what may differ from machine to machine: digits, which genre, widths, bars."""
    line = re.sub(rf"({GENRES})( \*)?", "genre", line)
    return re.sub(r"[+-]?\d[\d,.]*|#+|-{2,}| +", lambda m: " " if m[0][0] == " " else "#", line)


def summary(folder, recipe):
    return json.loads((folder / "tutorial" / recipe / "summary.json").read_text())["metrics"]["test"]["auc"]
