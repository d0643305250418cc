"""metrics.jsonl while it is written, cut short by a kill, and shortened by a resume."""

from __future__ import annotations

import pytest

from cdr_dist.training.console import Console
from cdr_dist.training.run_folder import RunFolder


def log(place, *steps):
    for step in steps:
        place.log(step=step, phase="train", split="train", values={"target_loss": step / 100})


def steps(lines):
    return [line["step"] for line in lines]


def test_a_follower_sees_every_line_once(tmp_path):
    place, file = RunFolder(str(tmp_path)), tmp_path / "metrics.jsonl"
    assert place.lines_after(0) == ([], 0)
    log(place, 10, 20)
    lines, seen = place.lines_after(0)
    assert (steps(lines), seen) == ([10, 20], file.stat().st_size)
    assert place.lines_after(seen) == ([], seen)
    with file.open("a") as half:
        half.write('{"step": 30, "spl')
    assert place.lines_after(seen) == ([], seen)
    with file.open("a") as rest:
        rest.write('it": "train"}\n')
    lines, seen = place.lines_after(seen)
    assert steps(lines) == [30]


def test_a_resume_drops_what_it_repeats_and_half_a_line(tmp_path):
    place, file = RunFolder(str(tmp_path)), tmp_path / "metrics.jsonl"
    log(place, 10, 20, 30)
    seen = place.lines_after(0)[1]
    with file.open("a") as half:
        half.write('{"step": 40, "spl')
    place.forget_after(20)
    assert steps(place.lines()) == [10, 20]
    assert steps(place.lines_after(seen)[0]) == [10, 20]


@pytest.mark.parametrize("longer", [0, 1, 2])
def test_a_console_goes_on_where_a_resume_has_rewritten_the_file(longer, tmp_path, capsys):
    """The end that it had seen is then beyond the file's, or in the middle of a line."""
    place = RunFolder(str(tmp_path))
    log(place, 10, 20, 30)
    with Console(place, "joint seed 8", 100):
        place.forget_after(10)
        log(place, *[123456, 20, 30][: 1 + longer])
    shown = [line.split()[4] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["123456", "20", "30"][: 1 + longer]


def test_the_console_shows_what_came_after_it_began(tmp_path, capsys):
    place = RunFolder(str(tmp_path))
    log(place, 10)
    with Console(place, "joint seed 8", 100):
        log(place, 20, 30)
    assert capsys.readouterr().err.splitlines() == [
        "joint seed 8  step 20  train  target_loss 0.2000",
        "joint seed 8  step 30  train  target_loss 0.3000",
    ]
