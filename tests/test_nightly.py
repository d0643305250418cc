"""Nights: what is published and what is not, ids that stay, crashes anywhere, two at once, and mistakes in one line."""

from __future__ import annotations

import datetime
import functools
import json
import shutil
from pathlib import Path

import polars as pl
import pytest

from cdr_dist.crash_points import EFFECTS
from cdr_dist.data.dataset import VOCABULARIES, read_manifest
from cdr_dist.data.synthetic import Planted, planted_logs
from cdr_dist.errors import UserError
from cdr_dist.production import nightly as module
from cdr_dist.production.gate import GateOptions, Scores, decide
from cdr_dist.production.nightly_job import nightly_job
from cdr_dist.production.options import NightlyOptions, read_words
from cdr_dist.production.publishing import Publisher
from cdr_dist.training import lease
from tests.crashes import KILLED, job
from tests.datasets import scratch
from tests.problem import replaced
from tests.test_prepare import keys_of

SHAPE = Planted(users=150, target_behaviours=6, source_behaviours=12, target_items=30, source_items=40, seed=5)
FIRST = datetime.date(2026, 1, 1)
NIGHTS = ["2026-01-04", "2026-01-05", "2026-01-06"]
SMALL = ["trainer.workers=0", "trainer.max_steps=6", "trainer.report=false", "batch.size=64", "upper.interval=3"]
OPEN = ["gate.auc=0", "gate.drop=1", "gate.calibration=9", "gate.rows=10"]


@functools.cache
def logs():
    """A file a day and domain; every third user comes on the fifth day only."""
    folder = scratch() / "days"
    for domain, log in (("books", planted_logs(SHAPE).source), ("films", planted_logs(SHAPE).target)):
        place = pl.int_range(pl.len()).over("user_id") * 6 // pl.len().over("user_id")
        late = (pl.col("user_id").str.slice(1).cast(pl.Int64) % 3 == 0) & (place < 4)
        timed = log.with_columns(day=place).filter(~late)
        seconds = (datetime.datetime(FIRST.year, FIRST.month, FIRST.day, tzinfo=datetime.UTC)).timestamp()
        timed = timed.with_columns(timestamp=int(seconds) + pl.col("day") * 86_400 + pl.int_range(pl.len()) % 86_000)
        for (day,), rows in timed.sort("timestamp").group_by("day", maintain_order=True):
            path = folder / domain / str(FIRST + datetime.timedelta(day)) / "part.parquet"
            path.parent.mkdir(parents=True)
            rows.drop("day").write_parquet(path)
    return folder


def night(date, out, *more, model=("recipe=biao",)):
    named = [f"{role}={logs()}/{domain}/{{date}}/" for role, domain in (("source", "books"), ("target", "films"))]
    chosen = {}
    for word in [*named, *SMALL, *OPEN, *model, f"date={date}", f"out={out}", *more]:
        chosen[word.partition("=")[0]] = word
    return list(chosen.values())


def latest(out):
    path = Path(out, "latest.json")
    return json.loads(path.read_text()) if path.exists() else None


def known(out, date):
    return json.loads(Path(out, "nights", date, "night.json").read_text())


def test_three_nights(tmp_path, capsys):
    out = tmp_path / "out"
    for number, date in enumerate(NIGHTS):
        nightly_job(night(date, out))
        said = capsys.readouterr().out
        assert said.startswith(f"{date}: published\n")
        assert ("AUC against the published model" in said) == (number > 0)
        assert latest(out)["date"] == date
        assert latest(out)["run"] == str(out / "runs" / date)
        assert known(out, date)["extends"] == (str(out / "datasets" / NIGHTS[number - 1]) if number else "")
        summary = json.loads((out / "runs" / date / "summary.json").read_text())
        assert latest(out)["checksum"] == summary["parameters_sha256"]
        assert ("started" in summary) == (number > 0)
        served = json.loads((out / "newest_recommendations.json").read_text())
        assert (served["date"], served["run"]) == (date, latest(out)["run"])
        rows = pl.read_parquet(f"{served['folder']}/part-*.parquet")
        assert len(rows) == read_manifest(str(out / "datasets" / date)).examples("users")
        assert rows["item_id"].list.len().max() == 20
        drift = known(out, date)["drift"]
        assert (drift or {}).get("against") == (NIGHTS[number - 1] if number else None)
        page = (out / "nights" / date / "report.html").read_text()
        assert f"Night of {date}" in page
        assert ("The last weeks" in page) == (number > 0)
    for name in VOCABULARIES:
        first, *others = (keys_of(str(out / "datasets" / date), name) for date in NIGHTS)
        assert all(other.items() >= first.items() for other in others)
    grew = [len(keys_of(str(out / "datasets" / date), "user")) for date in NIGHTS]
    assert grew[0] < grew[1] <= grew[2]
    manifest = read_manifest(str(out / "datasets" / NIGHTS[2]))
    tested = pl.read_parquet(out / "datasets" / NIGHTS[2] / "test")["timestamp"]
    day = datetime.datetime(2026, 1, 6, tzinfo=datetime.UTC).timestamp()
    assert manifest.examples("test") == len(tested) > 0
    assert tested.is_between(day, day + 86_399).all()
    before = (out / "latest.json").read_bytes()
    nightly_job(night(NIGHTS[2], out))
    assert capsys.readouterr().out.startswith("2026-01-06: done already, published\n")
    assert (out / "latest.json").read_bytes() == before


def test_a_bad_night_keeps_the_published_model_and_says_why_and_the_next_one_goes_on(tmp_path, capsys):
    out = tmp_path / "out"
    nightly_job(night(NIGHTS[0], out))
    before = (out / "latest.json").read_bytes()
    nightly_job(night(NIGHTS[1], out, "gate.auc=0.99"))
    said = capsys.readouterr().out
    assert "2026-01-05: kept 2026-01-04: AUC 0." in said
    assert "at least 0.99 wanted" in said
    assert (out / "latest.json").read_bytes() == before
    served = json.loads((out / "newest_recommendations.json").read_text())
    assert (served["date"], served["run"]) == (NIGHTS[1], str(out / "runs" / NIGHTS[0])), (
        "to today's users all the same"
    )
    nightly_job(night(NIGHTS[2], out, "recommend.top=3"))
    assert latest(out)["date"] == NIGHTS[2]
    rows = pl.read_parquet(out / "recommendations" / NIGHTS[2] / "part-*.parquet")
    assert rows["item_id"].list.len().max() == 3
    assert known(out, NIGHTS[2])["extends"] == str(out / "datasets" / NIGHTS[1]), "its ids are given"
    assert known(out, NIGHTS[2])["against"]["date"] == NIGHTS[0]


def test_a_missed_day_is_made_up_for_and_replaces_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    for date in (NIGHTS[0], NIGHTS[2], NIGHTS[1]):
        nightly_job(night(date, out))
    assert "2026-01-05: kept 2026-01-06: 2026-01-05 is an earlier day" in capsys.readouterr().out
    assert latest(out)["date"] == NIGHTS[2]
    missed = known(out, NIGHTS[1])
    assert missed["extends"] == str(out / "datasets" / NIGHTS[2])
    assert missed["against"] is None, "the published model has seen its test rows"
    assert "recommendations" not in missed, "nobody wants those of the day before"
    assert json.loads((out / "newest_recommendations.json").read_text())["date"] == NIGHTS[2]
    assert missed["metrics"]["test"]["auc"] > 0


# ---- crashes --------------------------------------------------------------------------------------------------------

FOLDERS = ("datasets", "runs", "nights", "recommendations")
OURS = [effect for effect in EFFECTS if effect.startswith(("nightly.", "recommend."))]
IN_CI = {"nightly.publish:before", "nightly.publish:after"}


@functools.cache
def undisturbed():
    """The folder after three nights of which one version stays, and a copy of it after two."""
    out, after_two = scratch() / "nights", scratch() / "two-nights"
    for date in NIGHTS[:2]:
        assert job("nightly", nightly_job, night(date, out, "keep=1")) == 0
    shutil.copytree(out, after_two)
    assert job("nightly", nightly_job, night(NIGHTS[2], out, "keep=1")) == 0
    return out, after_two, state(out)


def state(out):
    """What lasts of three nights."""
    dataset = read_manifest(str(out / "datasets" / NIGHTS[2]))
    entries = ("outcome", "metrics", "metrics_published", "against", "extends", "gate", "recommendations")
    return {
        "latest": latest(out),
        "newest": json.loads((out / "newest_dataset.json").read_text()),
        "served": json.loads((out / "newest_recommendations.json").read_text()),
        "lists": [path.read_bytes() for path in sorted((out / "recommendations" / NIGHTS[2]).glob("part-*"))],
        "dataset": dataset.checksum,
        "night": {name: known(out, NIGHTS[2])[name] for name in entries},
        "folders": {name: sorted(p.name for p in (out / name).iterdir()) for name in FOLDERS},
    }


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(point, marks=[] if point in IN_CI else [pytest.mark.soak])
        for effect in OURS
        for point in (f"{effect}:before", f"{effect}:after")
    ],
)
def test_killed_at_any_point_the_same_command_ends_as_if_nothing_had_happened(point):
    out, after_two, wanted = undisturbed()
    shutil.rmtree(out)
    shutil.copytree(after_two, out)
    given = night(NIGHTS[2], out, "keep=1")
    assert job("nightly", nightly_job, given, crash=point) == KILLED
    if point != "nightly.publish:after":
        assert latest(out)["date"] in NIGHTS[1:]
    assert job("nightly", nightly_job, given) == 0
    assert state(out) == wanted


def test_old_versions_go_and_what_is_needed_stays():
    _, _, wanted = undisturbed()
    assert wanted["folders"]["runs"] == NIGHTS[2:]
    assert wanted["folders"]["datasets"] == NIGHTS[2:]
    assert wanted["folders"]["recommendations"] == NIGHTS[2:]
    assert wanted["folders"]["nights"] == NIGHTS, "what they came to stays"


def test_ids_of_a_night_that_died_before_it_said_so_are_given_to_nobody(tmp_path):
    """Killed between its dataset and the word of it, and never begun again: the next night finds the dataset."""
    out = tmp_path / "out"
    assert job("nightly", nightly_job, night(NIGHTS[0], out)) == 0
    assert job("nightly", nightly_job, night(NIGHTS[1], out), crash="nightly.grown:before") == KILLED
    nightly_job(night(NIGHTS[2], out))
    assert known(out, NIGHTS[2])["extends"] == str(out / "datasets" / NIGHTS[1])
    nightly_job(night(NIGHTS[1], out))  # the dead night after all: later ids are given by now
    newest = json.loads((out / "newest_dataset.json").read_text())
    assert (newest["dataset"], newest["growing"]) == (str(out / "datasets" / NIGHTS[2]), "")


def test_the_last_night_can_be_taken_back_and_done_again(tmp_path, capsys, monkeypatch):
    """As docs/operations.md says, after a broken log; and the page of a night cannot undo it."""
    out = tmp_path / "out"
    nightly_job(night(NIGHTS[0], out))
    nightly_job(night(NIGHTS[1], out, "gate.auc=1"))
    assert "kept 2026-01-04" in capsys.readouterr().out
    for folder in ("nights", "runs", "datasets", "recommendations"):
        shutil.rmtree(out / folder / NIGHTS[1])

    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("cdr_dist.production.nightly_report.report_of_night", broken)
    nightly_job(night(NIGHTS[1], out))
    assert capsys.readouterr().out.startswith("2026-01-05: published\n")
    assert known(out, NIGHTS[1])["extends"] == str(out / "datasets" / NIGHTS[0])
    assert json.loads((out / "newest_dataset.json").read_text())["dataset"] == str(out / "datasets" / NIGHTS[1])


def test_a_night_killed_before_it_looked_at_the_day_looks_later(tmp_path):
    out = tmp_path / "out"
    nightly_job(night(NIGHTS[0], out))
    with replaced(module, "day_of", lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
        nightly_job(night(NIGHTS[1], out))
    assert "dataset" in known(out, NIGHTS[1])
    nightly_job(night(NIGHTS[1], out))
    assert known(out, NIGHTS[1])["drift"]["against"] == NIGHTS[0]


# ---- two at once ----------------------------------------------------------------------------------------------------


def test_one_night_at_a_time(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with replaced(lease, "_alive", lambda *_: True):
        (out / lease.FILE).write_text(json.dumps({"host": "h", "process": 1, "since": 0, "token": "x", "beats": 1}))
        with pytest.raises(UserError, match=r"another job works here .process 1 on h.; wait for its end"):
            nightly_job(night(NIGHTS[0], out))


def test_a_stale_night_that_wakes_up_publishes_nothing(tmp_path):
    out = tmp_path / "out"

    def taken_over(*given):
        found = decide(*given)
        other = json.loads((out / lease.FILE).read_text()) | {"token": "another's"}
        (out / lease.FILE).write_text(json.dumps(other))
        return found

    with replaced(module, "decide", taken_over), pytest.raises(UserError, match="another job has taken over here"):
        nightly_job(night(NIGHTS[0], out))
    assert latest(out) is None


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["date=2999-01-01"], "date=2999-01-01: is in the future; today is "),
        (["date=yesterday"], "date=yesterday: write a day, as 2026-11-24"),
        (["date=2026-02-30"], "date=2026-02-30: write a day"),
        (["date=2026-01-12"], "books/2026-01-12/: not found: the source has no log of 2026-01-12 yet"),
        (["window=2"], "window=2: must be 3 or more"),
        (["zone=Atlantis"], "zone=Atlantis: unknown time zone"),
        (["source=x"], r"source=x: name the logs by day, as logs/books/\{date\}/"),
        (["extends=x"], "extends=: is set by the night itself: yesterday's dataset"),
        (["warm_start.run=x"], "warm_start.run=: is set by the night itself: the published model"),
        (["recipy=biao"], "recipy: unknown option; did you mean 'recipe'"),
        (["gate.auc=2"], "gate.auc=2.0: must be between 0 and 1"),
        (["config=nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_everything(more, message, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=message) as error:
        nightly_job(night(NIGHTS[0], out, *more))
    assert "\n" not in str(error.value)
    assert latest(out) is None
    assert not (out / "datasets").exists()


def test_an_option_given_twice_and_a_malformed_file_are_refused(tmp_path):
    with pytest.raises(UserError, match="date= is given twice"):
        read_words(["date=2026-01-04", "date=2026-01-05"])
    for text, message in {
        "source: [": "is no YAML in line 1",
        "- a": "must hold options",
        "date: 2026-01-01": "date and config are given with the command",
        "sourse: x": "sourse: unknown option",
    }.items():
        (tmp_path / "night.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            read_words([f"config={tmp_path}/night.yaml", *night(NIGHTS[0], tmp_path / "out")])


def test_a_night_is_finished_with_the_options_it_was_begun_with(tmp_path):
    out = tmp_path / "out"
    nightly_job(night(NIGHTS[0], out, "gate.auc=0.99"))
    with pytest.raises(UserError, match=r"night.json: was begun with other options \(window\)"):
        nightly_job(night(NIGHTS[0], out, "window=9"))


def test_a_file_says_the_same_as_words(tmp_path):
    text = "source: a/{date}\ntarget: b/{date}\nout: o\nbatch:\n  size: 8\ngate: {drop: 0.5}\n"
    (tmp_path / "night.yaml").write_text(text + "trainer: {workers: 0, report: false}\nevaluation: {ks: [5, 10]}\n")
    found = read_words(["date=2026-01-04", f"config={tmp_path}/night.yaml", "batch.size=16"])
    assert found.own.gate == GateOptions(drop=0.5)
    config = found.train_config("data", "run", "")
    assert (config.batch.size, config.trainer.workers, config.trainer.report) == (16, 0, False)
    assert config.evaluation.ks == [5, 10]
    assert found.prepare == ["source=a/{date}", "target=b/{date}"]


def test_what_latest_json_names_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Publisher("models/films").run("2026-01-04") == f"{tmp_path}/models/films/runs/2026-01-04"
    assert Publisher("s3://models/films").run("2026-01-04") == "s3://models/films/runs/2026-01-04"


def test_days_begin_where_the_logs_are():
    utc, berlin = (NightlyOptions("2026-01-04", out="o", zone=zone) for zone in ("UTC", "Europe/Berlin"))
    assert utc.begins() == 1_767_484_800
    assert berlin.begins() == utc.begins() - 3600
    assert utc.begins(-1) == utc.begins() - 86_400


# ---- the gate -------------------------------------------------------------------------------------------------------


def scores(signal, shift=0.0, rows=400):
    import numpy as np

    random = np.random.default_rng(3)
    label = np.tile([1.0, 0.0], rows // 2)
    return Scores(np.arange(rows) // 2, label, signal * (2 * label - 1) + shift + random.normal(size=rows))


def test_log_loss_is_shown_and_asked_for_only_where_a_threshold_is_set():
    import numpy as np

    old = scores(0.5)
    new = Scores(old.user, old.label, 4 * old.score)  # as good a ranking, far too sure
    p = 1 / (1 + np.exp(-new.score))
    expected = float(-np.mean(np.where(new.label > 0, np.log(p), np.log1p(-p))))
    assert new.logloss == pytest.approx(expected)
    assert decide(GateOptions(calibration=9), new, old, 0.9).passes
    verdict = decide(GateOptions(calibration=9, logloss=0.1), new, old, 0.9)
    assert [check.name for check in verdict.checks if not check.holds] == ["log loss - published"]


@pytest.mark.parametrize(
    ("new", "old", "known_share", "fails"),
    [
        (scores(0.5), None, 0.9, ""),
        (scores(0.5), scores(0.5), 0.9, ""),
        (scores(0.5), scores(0.505), 0.9, ""),
        (scores(0.5), scores(0.8), 0.9, "AUC - published"),
        (scores(-0.5), None, 0.9, "AUC"),
        (scores(0.5, shift=3.0), None, 0.9, "calibration"),
        (scores(0.5), None, 0.1, "share of known rows"),
        (scores(0.5, rows=40), None, 0.9, "test rows"),
    ],
)
def test_each_threshold_is_missed_by_what_misses_it_and_nothing_else(new, old, known_share, fails):
    verdict = decide(GateOptions(), new, old, known_share)
    assert [check.name for check in verdict.checks if not check.holds] == ([fails] if fails else [])
    assert verdict.passes == (not fails)
    assert (fails in str(verdict)) if fails else str(verdict) == "every threshold is met"
