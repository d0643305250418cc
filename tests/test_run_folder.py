"""metrics.jsonl while it is written, cut short by a kill, and shortened by a resume."""

from __future__ import annotations

import os
import threading

import pytest

from cdr_dist.configuration import from_words
from cdr_dist.data import storage
from cdr_dist.errors import UserError
from cdr_dist.training.checks import build_model
from cdr_dist.training.console import Console
from cdr_dist.training.run_folder import RunFolder
from cdr_dist.training.start import _to_agree


def log(place, *steps):
    for step in steps:
        place.log(step=step, phase="train", split="train", values={"target_loss": step / 100})


def steps(lines):
    return [line["step"] for line in lines]


def test_a_folder_is_the_same_however_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = ["runs/x", "./runs/x", f"{tmp_path}/runs/x/", f"file://{tmp_path}/runs/x"]
    assert {RunFolder(uri).uri for uri in named} == {str(tmp_path / "runs" / "x")}
    assert RunFolder("s3://bucket/x/").uri == "s3://bucket/x"


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
        rest.write('it": "train", "values": {}, "time": 1.0}\n')
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


DAMAGE = {
    "zeros": lambda line: bytes(len(line)),
    "half": lambda line: line[: len(line) // 2],
    "a number": lambda line: b"7",
    "bytes": lambda line: b"\xff" + line,
    "no step": lambda line: line.replace(b"step", b"stop"),
    "empty": lambda line: b"",
}


def damaged(file, number, damage):
    lines = file.read_bytes().splitlines()
    lines[number - 1] = DAMAGE[damage](lines[number - 1])
    file.write_bytes(b"\n".join(lines) + b"\n")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_last_line_that_lost_power_is_dropped(damage, tmp_path):
    place, file = RunFolder(str(tmp_path)), tmp_path / "metrics.jsonl"
    log(place, 10, 20, 30)
    damaged(file, 3, damage)
    assert steps(place.lines()) == [10, 20]
    place.forget_after(30)
    log(place, 40)
    assert steps(place.lines()) == [10, 20, 40]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_elsewhere_is_named(damage, tmp_path):
    place, file = RunFolder(str(tmp_path)), tmp_path / "metrics.jsonl"
    log(place, 10)
    seen = place.lines_after(0)[1]
    log(place, 20, 30)
    damaged(file, 2, damage)
    for read in (place.lines, lambda: place.lines_after(seen), lambda: place.forget_after(30)):
        with pytest.raises(UserError, match=f"^{file}: line 2 is damaged; delete that line"):
            read()
    with pytest.raises(UserError, match="line 2 is damaged"), Console(place, "joint seed 8", 100):
        pass


def test_a_console_outlives_a_line_that_is_damaged_while_it_looks(tmp_path, capsys):
    place, file, looked = RunFolder(str(tmp_path)), tmp_path / "metrics.jsonl", threading.Event()
    log(place, 10)

    def look(offset, before=place.lines_after):
        try:
            return before(offset)
        except UserError:
            looked.set()
            raise

    with Console(place, "joint seed 8", 100):
        place.lines_after = look
        file.write_bytes(b"{\n" + file.read_bytes())
        assert looked.wait(20)
        file.write_bytes(b"")
        log(place, 123456)  # ends elsewhere than the line before
    assert capsys.readouterr().err.splitlines() == ["joint seed 8  step 123456  train  target_loss 1234.5600"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"steps": 3}', b"\x00" * 40])
def test_a_damaged_summary_is_named(content, tmp_path):
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(UserError, match=f"^{tmp_path}/summary.json: damaged; delete it, and the same command"):
        RunFolder(str(tmp_path)).summary()


def test_a_run_from_before_an_option_of_its_model_goes_on_and_is_started_from(tmp_path):
    """At its default it changes nothing; at another value, it is another run."""
    given = ["data=x", "recipe=joint", "model=minet", f"run={tmp_path / 'run'}"]
    place, now = RunFolder(str(tmp_path / "run")), from_words(given)
    place.open(now)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("  user_features: []\n", ""))
    assert "user_features" not in place.config().model
    place.check(now)
    assert all(old == new for _, old, new in _to_agree(place.config(), now, build_model(now)))
    changed = from_words([*given, "model.user_features=[age]"])
    with pytest.raises(UserError, match=r"model.user_features: \[\] -> \['age'\]"):
        place.check(changed)
    assert not all(old == new for _, old, new in _to_agree(place.config(), changed, build_model(changed)))


def test_a_folder_is_removed_whole_while_another_renames_and_writes_in_it(tmp_path, monkeypatch):
    """A lease's sign of life that comes while the run's folder is removed."""
    folder = tmp_path / "run"
    (folder / "a").mkdir(parents=True)
    for name in ("half.part", "a/one"):
        (folder / name).write_text("x")
    unlink, rmdir = os.unlink, os.rmdir
    came = []

    def unlink_late(path, *, dir_fd=None):
        if path == "half.part":
            came.append("renamed")
            os.replace(folder / "half.part", folder / "whole")
        unlink(path, dir_fd=dir_fd)

    def rmdir_late(path, *, dir_fd=None):
        if path == str(folder) and "written" not in came:
            came.append("written")
            (folder / "late").write_text("x")
        rmdir(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink_late)
    monkeypatch.setattr(os, "rmdir", rmdir_late)
    storage.remove_folder(str(folder))
    assert came == ["renamed", "written"]
    assert not folder.exists()
