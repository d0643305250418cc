"""Prepare and the user's mistakes: one clear line, exit code 2, and nothing left behind."""

from __future__ import annotations

import gzip
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest

from cdr_dist.data import prepare as prepare_module
from cdr_dist.data.dataset import SPLITS
from cdr_dist.data.prepare import options_from_words, prepare
from cdr_dist.data.prepare_options import describe_options
from cdr_dist.errors import UserError
from cdr_dist.jobs import run_job

ROOT = Path(__file__).parents[1]
HEADER = "user_id\titem_id\ttimestamp\trating\n"
WORDS = ["source=s.tsv", "target=t.tsv", "out=out"]
GOOD = HEADER + "".join(f"u\ti{n}\t{n}\t5\n" for n in range(4))


def exit_code(job, words):
    """As `python jobs/prepare.py WORDS` ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["prepare.py", *words])
        return run_job("prepare", job.__doc__, job.main, lambda: "Options, as name=value:\n" + describe_options())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two good logs."""
    monkeypatch.chdir(tmp_path)
    for name in ("s.tsv", "t.tsv"):
        (tmp_path / name).write_text(GOOD)
    return tmp_path


@pytest.fixture(scope="module")
def job() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_job", ROOT / "jobs" / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fails(words: str) -> str:
    """The error of preparing with `words` over s.tsv and t.tsv; checks that nothing new is left."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with pytest.raises(UserError) as error:
        prepare(options_from_words([*WORDS, *words.split()]))
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    assert not [path for path in Path().iterdir() if ".unfinished" in path.name]
    message = str(error.value)
    assert "\n" not in message
    return message


def fails_with_target(text: str | bytes, words: str = "", name: str = "t.tsv") -> str:
    Path(name).write_bytes(text.encode() if isinstance(text, str) else text)
    made = words.split()
    if name != "t.tsv":
        before = set(Path().rglob("*"))
        with pytest.raises(UserError) as error:
            prepare(options_from_words(["source=s.tsv", f"target={name}", "out=out", *made]))
        assert set(Path().rglob("*")) == before
        assert "\n" not in str(error.value)
        return str(error.value)
    return fails(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("thresold=3", "thresold: unknown option; did you mean 'threshold'?"),
        ("threshold", "'threshold': options are written key=value"),
        ("threshold=high", "threshold=high: not a number"),
        ("threshold=nan", "threshold=nan: must be a finite number"),
        ("seed=1.5", "seed=1.5: not a whole number"),
        ("seed=1 seed=2", "seed= is given twice"),
        ("split=leave_lst", "split=leave_lst: did you mean 'leave_last'?"),
        ("format=logs", "format=logs: known: amazon, coldrec, recbole, table, windows"),
        ("columns.usr=a", "columns.usr: unknown option; did you mean 'columns.user'?"),
        ("split=time", "split=time needs valid_from= and test_from="),
        ("split=time valid_from=3 test_from=3", "valid_from=3 must be before test_from=3"),
        ("valid_from=3", "valid_from= and test_from= need split=time"),
        ("history_length=0", "history_length=0: must be 1 or more"),
        ("workers=-1", "workers=-1: must be 0 or more"),
    ],
)
def test_a_wrong_option_is_named(folder: Path, words: str, message: str) -> None:
    assert fails(words) == message


@pytest.mark.parametrize("name", ["source", "target", "out"])
def test_a_missing_option_is_named(name: str) -> None:
    words = [f"{other}=x" for other in ("source", "target", "out") if other != name]
    with pytest.raises(UserError, match=rf"^{name}= is missing$"):
        options_from_words(words)


@pytest.mark.parametrize(
    ("target", "words", "message"),
    [
        ("user_id\titem_id\n", "", "t.tsv: no column 'timestamp' (columns.timestamp=); found: user_id, item_id"),
        ("user_id\titem_id\ttimestamp\n", "", "t.tsv: no column 'rating' (columns.rating=); found: user_id, item_id, "
         "timestamp"),
        (GOOD, "columns.item=asin", "s.tsv: no column 'asin' (columns.item=); found: user_id, item_id, timestamp, "
         "rating"),
        (GOOD, "columns.category=kind", "s.tsv: no column 'kind' (columns.category=); found: user_id, item_id, "
         "timestamp, rating"),
        (GOOD + "u\tx\t2014-07-01\t5\n", "", "t.tsv: line 6: timestamp '2014-07-01' is not a whole number"),
        (GOOD + "u\tx\t1.5\t5\n", "", "t.tsv: line 6: timestamp '1.5' is not a whole number"),
        (GOOD + "u\tx\t\t5\n", "", "t.tsv: line 6: timestamp (empty) is not a whole number"),
        (GOOD + "u\tx\t5\tfive\n", "", "t.tsv: line 6: rating 'five' is not a number"),
        (GOOD + "u\tx\t5\tnan\n", "", "t.tsv: line 6: rating 'nan' is not a number"),
        (GOOD + "u\tx\t5\t\n", "", "t.tsv: line 6: rating (empty) is not a number"),
        (GOOD + "\tx\t5\t5\n", "", "t.tsv: line 6: the user is empty"),
        (GOOD + "u\t\t5\t5\n", "", "t.tsv: line 6: the item is empty"),
        (GOOD + "u\tx\n", "", "t.tsv: cannot be read (CSV parse error: Row #6: Expected 4 columns, got 2: u\tx)"),
        ("", "", "t.tsv: is empty; its first line must name the columns"),
        (HEADER, "", "no user in both logs (s.tsv, t.tsv): nothing to prepare"),
        (HEADER, "users=target", "no user in the target log (s.tsv, t.tsv): nothing to prepare"),
        (GOOD.replace("u\t", "v\t"), "", "no user in both logs (s.tsv, t.tsv): nothing to prepare"),
        (HEADER + "u\ti\t1\t5\nu\ti\t2\t5\n", "", "no user has 3 target behaviours, which split=leave_last needs: "
         "training, validation and test"),
        (GOOD, "split=time valid_from=0 test_from=2", "no target behaviour before valid_from=0: nothing to train on"),
        (GOOD, "threshold=9", "threshold=9.0: no rating of t.tsv is above it: nothing to learn"),
        (GOOD, "source_columns.user=uid", "s.tsv: no column 'uid' (source_columns.user=); found: user_id, item_id, "
         "timestamp, rating"),
        (GOOD, "target_items=s.tsv target_item_columns.category=kind", "s.tsv: no column 'kind' "
         "(target_item_columns.category=); found: user_id, item_id, timestamp, rating"),
        (GOOD, "labels=sampled", "eval_negatives=1: the catalogue has 4 target items, of which one user leaves 0; "
         "take fewer negatives"),
        (GOOD, "source_domain=a target_domain=a", "both domains are named a: give source_domain= or target_domain="),
        (GOOD, "target_items=none.csv", "none.csv: not found"),
        (GOOD, "target_items=s.tsv", "s.tsv: no column 'category' (item_columns.category=); found: user_id, item_id, "
         "timestamp, rating"),
        (GOOD, "target=none.tsv", "target= is given twice"),
    ],
)  # fmt: skip
def test_a_bad_log_is_named_with_its_line(folder: Path, target: str, words: str, message: str) -> None:
    assert fails_with_target(target, words) == message


def test_a_late_line_of_a_long_log_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdr_dist.data.sources.table.BLOCK_BYTES", 1000)
    rows = "".join(f"u\ti{n}\t{n}\t5\n" for n in range(5000))
    message = fails_with_target(HEADER + rows + "u\tx\tsoon\t5\n")
    assert message == "t.tsv: line 5002: timestamp 'soon' is not a whole number"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("t.tsv.gz", lambda b: b[:-20], "t.tsv.gz: cannot be read (Truncated compressed stream)"),
        ("t.tsv.gz", lambda b: b"x" + b, "t.tsv.gz: cannot be read (zlib inflate failed: incorrect header check)"),
        ("t.parquet", lambda b: b[:-20], "t.parquet: cannot be read (Parquet magic bytes not found in footer. Either "
         "the file is corrupted or this is not a parquet file.)"),
        ("t.xlsx", lambda b: b, "t.xlsx: unknown kind of file; known endings: .csv, .csv.gz, .tsv, .tsv.gz, .parquet"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(folder: Path, name: str, damage: Callable[[bytes], bytes], message: str) -> None:
    if name.endswith(".parquet"):
        pl.DataFrame({"user_id": ["u"], "item_id": ["i"], "timestamp": [1], "rating": [5]}).write_parquet(name)
        content = Path(name).read_bytes()
    else:
        content = gzip.compress("".join(GOOD + f"u\ti{n * 7919}\t{n}\t5\n" for n in range(9)).encode())
    assert fails_with_target(damage(content), name=name) == message


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("rating", [5.0, None, 5.0], "t.parquet: row 2: rating (empty) is not a number"),
        ("timestamp", [1, 2, None], "t.parquet: row 3: timestamp (empty) is not a whole number"),
        ("user_id", [1.0, 2.0, 3.0], "t.parquet: column 'user_id' holds fractions; a user's id is text or a whole "
         "number"),
    ],
)  # fmt: skip
def test_a_bad_row_of_parquet_is_named(folder: Path, column: str, values: list[Any], message: str) -> None:
    good = {"user_id": ["u"] * 3, "item_id": list("abc"), "timestamp": [1, 2, 3], "rating": [5.0] * 3}
    pl.DataFrame(good | {column: values}).write_parquet("t.parquet")
    assert fails_with_target(Path("t.parquet").read_bytes(), name="t.parquet") == message


def test_a_missing_log_is_named(folder: Path) -> None:
    Path("t.tsv").unlink()
    assert fails("") == "t.tsv: not found"


def test_a_folder_of_the_users_is_never_touched(folder: Path) -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("years of work")
    assert fails("") == "out: exists and is not a dataset; choose another out="
    assert Path("out/thesis.txt").read_text() == "years of work"


def test_an_output_folder_that_cannot_be_made_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^s.tsv/out: cannot be written \(.*Not a directory.*\)$"):
        prepare(options_from_words([*WORDS[:2], "out=s.tsv/out"]))


def test_an_empty_output_folder_is_used(folder: Path) -> None:
    Path("out").mkdir()
    prepare(options_from_words([*WORDS[:2], "out=out/"]))
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "manifest.json",
        *sorted([*SPLITS, "users", "vocab"]),
    ]


def test_a_dataset_of_other_options_is_refused_and_kept(folder: Path) -> None:
    prepare(options_from_words(WORDS))
    message = "out: holds a dataset of other options (threshold 3.0, now 4.0; seed 8, now 9); choose another out="
    assert fails("threshold=4 seed=9") == message


def test_a_log_that_has_grown_is_noticed(folder: Path) -> None:
    prepare(options_from_words(WORDS))
    with Path("t.tsv").open("a") as log:
        log.write("u\ti9\t9\t5\n")
    assert fails("") == "out: holds a dataset of other options (target_bytes 69, now 78); choose another out="


def test_a_failure_of_the_program_leaves_nothing_either(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(prepare_module, "_write_shards", disk_full)
    with pytest.raises(OSError, match="No space left"):
        prepare(options_from_words(WORDS))
    assert sorted(path.name for path in folder.iterdir()) == ["s.tsv", "t.tsv"]


def test_what_a_killed_run_left_does_no_harm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("cdr_dist.data.storage.remove_folder", lambda uri, tries=0: None)
        patch.setattr("cdr_dist.data.storage.move_folder", lambda *_, **__: None)
        prepare(options_from_words([*WORDS, "partitions=4"]))
    (left,) = (path for path in folder.iterdir() if path.is_dir())
    for shard in left.rglob("*.arrow"):
        shard.write_bytes(shard.read_bytes()[:40])
    prepare(options_from_words(WORDS))
    assert sorted(path.name for path in folder.iterdir()) == ["out", "s.tsv", "t.tsv"]


def test_check_starts_nothing(folder: Path, job: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(job, [*WORDS, "--check"]) == 0
    assert capsys.readouterr().out == "the options and the inputs are in order\n"
    assert sorted(path.name for path in folder.iterdir()) == ["s.tsv", "t.tsv"]
    assert exit_code(job, [*WORDS, "columns.user=uid", "--check"]) == 2
    message = "prepare: s.tsv: no column 'uid' (columns.user=); found: user_id, item_id, timestamp, rating\n"
    assert capsys.readouterr().err == message


def test_help_names_every_option_with_its_default(job: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(job, ["--help"]) == 0
    shown = capsys.readouterr().out
    assert "python jobs/prepare.py format=table source=" in shown
    for option in ("source=(required)", "threshold=3.0", "columns.user=user_id", "item_columns.category=category"):
        assert option in shown


def test_job_exits_with_two_and_one_line(folder: Path) -> None:
    words = ["source=s.tsv", "target=none.tsv", "out=out"]
    done = subprocess.run([sys.executable, ROOT / "jobs" / "prepare.py", *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "prepare: none.tsv: not found\n")


def test_job_prints_the_counts(folder: Path) -> None:
    done = subprocess.run([sys.executable, ROOT / "jobs" / "prepare.py", *WORDS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "behaviours             4           4" in done.stdout
    assert Path("out/manifest.json").exists()
