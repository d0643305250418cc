"""The training job and the user's mistakes: one clear line on stderr, exit code 2, nothing half-written left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cdr_dist.jobs import run_job
from cdr_dist.training.job import train_job
from tests.datasets import copied, edited, rated, sampled
from tests.runs import summary, words

ROOT = Path(__file__).parents[1]


@pytest.fixture
def job(monkeypatch, capsys, tmp_path):
    """Runs the job in this process and in an empty folder -> (exit code, stdout, lines of stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*given, check=False):
        flag = ["--check"] if check else []
        monkeypatch.setattr("sys.argv", ["train.py", *given, *flag])
        code = run_job("train", None, lambda w: train_job([x for x in w if x != "--check"], check="--check" in w))
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run


def files(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


def mistake(job, given, *expected):
    """Checks the line and that the job leaves nothing, both when it runs and when it only checks."""
    before = files(".")
    for check in (True, False):
        code, out, lines = job(*given, check=check)
        assert (code, out, len(lines)) == (2, "", 1), (code, out, lines)
        assert lines[0].startswith("train: ")
        for part in expected:
            assert part in lines[0], lines[0]
        assert files(".") == before
    return lines[0]


def cycle(update):
    """Words for a recipe of one's own with this update."""
    return ["recipe=joint", f"recipe.phases=[{{name:p,cycle:[{{update:{{{update}}}}}]}}]"]


def backbone(name):
    return ["model=custom", f"model._target_=tests.backbones.{name}"]


OPTIONS = {
    "unknown option": (["trainer.max_stps=3"], "trainer.max_stps: unknown option; did you mean 'trainer.max_steps'?"),
    "unknown group": (["optimizer.lr=3"], "optimizer.lr: unknown option"),
    "no value": (["trainer.max_steps"], "'trainer.max_steps': options are written key=value"),
    "unknown recipe": (["recipe=biaoo"], "recipe=biaoo: unknown recipe; did you mean 'biao'?"),
    "unknown model": (["model=connet"], "model=connet: unknown model; did you mean 'conet'?"),
    "unknown preset": (["preset=as_papr"], "preset=as_papr: unknown preset; did you mean 'as_paper'?"),
    "a word for a number": (["trainer.max_steps=many"], "trainer.max_steps", "many"),
    "a fraction for a whole number": (["batch.size=6.5"], "batch.size", "6.5"),
    "a broken list": (["model.hidden=[3"], "model.hidden"),
    "out of range": (["batch.size=0"], "batch.size=0: must be at least 1"),
    "width": (["tables.width=10"], "tables.width=10: must be a positive multiple of 4"),
    "choice": (["upper.dev=reorderd"], "upper.dev=reorderd: choose reordered, split, same_users or rotating"),
    "metric": (["evaluation.metric=acu"], "evaluation.metric=acu: choose auc, gauc, logloss, accuracy, f1, hr@K, "),
    "metric among all items": (
        ["evaluation.metric=full_mrr@5", "evaluation.full_ks=[10]", "evaluation.patience=1"],
        "evaluation.metric=full_mrr@5: needs evaluation.full_ks=[5]",
    ),
    "metric of classes": (
        ["evaluation.metric=f1"],
        "evaluation.metric=f1: ",
        "has no classes; prepare it with classes=N",
    ),
    "what is excluded": (["evaluation.full_exclude=all"], "evaluation.full_exclude=all: choose train or none"),
    "ranking without negatives": (["evaluation.ks=[10]"], "evaluation.ks=[10]", "stores no negatives"),
    "no such class": (["model._target_=cdr_dist.models.conet.CoNett"], "model: ", "CoNett"),
    "no such module": (["model._target_=cdr_dist.nothing.CoNet"], "model: ", "cdr_dist.nothing"),
    "a model's own option": (["model.hidden=[]"], "model: "),
    "no such update": (cycle("_target_:cdr_dist.training.lower.Lowerr"), "recipe=joint, phase p: ", "Lowerr"),
    "an update without weighting": (
        cycle("_target_:cdr_dist.training.lower.Lower"),
        "recipe=joint, phase p: ",
        "weighting",
    ),
    "an update without a name": (cycle("weighting:1"), "recipe=joint, phase p: needs a _target_"),
    "a flag": (["--chek"], "--chek: unknown; did you mean '--check'?"),
    "the job's own groups only": (["experiment=demo"], "experiment: unknown option"),
    "a rate below zero": (["dense.lr=-1"], "dense.lr=-1.0: must be above 0 and finite"),
    "an inverse without products": (
        ["hypergradient.inverse=conjugate_gradient"],
        "hypergradient.inverse=conjugate_gradient: needs hypergradient.terms",
    ),
    "a tolerance of nothing": (
        ["hypergradient.tolerance=1e-8", "hypergradient.terms=9"],
        "hypergradient.tolerance=1e-08: only conjugate_gradient has one, and hypergradient.inverse=neumann",
    ),
    "no such start": (["perceptron.start=equl"], "perceptron.start=equl: choose equal or random"),
    "no interval": (["upper.interval=0"], "upper.interval=0: must be at least 1"),
    "a cycle without end": (["upper.interval=1000000000"], "upper.interval=1000000000: must be at most 1,000,000"),
    "no times": (
        ["recipe.phases=[{name: a, cycle: [{update: {_target_: cdr_dist.training.lower.Lower}, times: 0}]}]"],
        "recipe.phases: an update 0 times in a row: must be 1 to 1,000,000",
    ),
    "no coefficient": (["upper.gamma0=0"], "upper.gamma0=0.0: must be above 0"),
    "no epochs": (["trainer.epochs=0"], "trainer.epochs=0: must be at least 1"),
    "a word for a list": (["hypergradient.theta=user"], "hypergradient.theta: ", "lists are written [64,32]"),
    "no such table": (["hypergradient.theta=[usr]"], "hypergradient.theta: 'usr' is unknown; did you mean 'user'?"),
    "logits in a column": (backbone("TwoColumns"), "target_logit of 2 rows has shape [2, 1], not [2]"),
    "another width": (
        backbone("NoWidth"),
        "target_features of 2 rows has shape [2, 8], not [2, target_feature_width=9]",
    ),
    "an unknown feature": (backbone("UnknownFeature"), "reads the feature brand, which "),
    "a head that is not there": (backbone("LostHead"), "heads() names sourse_head"),
    "nothing to weigh by": ([*backbone("TargetItemsOnly"), "recipe=biao"], "the model does not read target_category"),
    **{
        f"no source loss for {recipe}": (
            [*backbone("NoSourceLoss"), f"recipe={recipe}"],
            f"recipe={recipe}: counts the loss of every source behaviour, but model tests.backbones.NoSourceLoss",
        )
        for recipe in ("joint", "biao", "gradient_cosine")
    },
    "more workers than lanes": (["trainer.workers=9"], "trainer.workers=9 but stream.lanes=8"),
    "Adam on CPU": (["tables.optimiser=adam"], "tables.optimiser=adam: FBGEMM has no Adam on CPU"),
}


@pytest.mark.parametrize("recipe", ["target_only", "source_features"])
def test_who_counts_no_source_loss_needs_none(recipe, job):
    code, _, lines = job(*words(rated(), "run", *backbone("NoSourceLoss"), f"recipe={recipe}"), check=True)
    assert (code, lines) == (0, [])


@pytest.mark.parametrize("case", OPTIONS)
def test_a_bad_option(case, job):
    given, *expected = OPTIONS[case]
    mistake(job, words(rated(), "run", *given), *expected)


def test_no_data_and_a_run_that_is_no_folder(job):
    mistake(job, words("", "run"), "data= is empty")
    mistake(
        job, words(rated(), "s3://bucket/run"), "s3://bucket/run/config.yaml: cannot be read (Unable to locate cred"
    )


def test_a_recipe_that_needs_planted_truth(job, tmp_path):
    dataset = copied(rated(), tmp_path)
    (dataset / "truth.parquet").unlink()
    mistake(job, words(dataset, "run", "recipe=oracle"), "needs data with planted truth")


def test_validation_rows_of_one_label(job, monkeypatch):
    """Found when it is measured."""
    monkeypatch.setattr("cdr_dist.training.lower.validation_metrics", lambda *_: {"auc": float("nan")})
    code, out, lines = job(*words(rated(), "run", "recipe=joint"))
    assert (code, out) == (2, "")
    assert "evaluation.metric=auc has no value on the validation rows" in lines[-1]


def test_a_batch_that_does_not_hold_whole_groups(job):
    given = words(sampled(), "run", "batch.size=63")
    mistake(job, given, "batch.size=63: must be a multiple of 2 (a row and its negatives)")


def test_a_metric_that_is_not_computed(job):
    given = words(sampled(), "run", "evaluation.metric=hr@10")
    mistake(job, given, "evaluation.metric=hr@10: needs evaluation.ks=[10]")


# ---- the dataset ----------------------------------------------------------------------------------------------------


def nothing(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()


def manifest_of(text):
    return lambda folder: (folder / "manifest.json").write_bytes(text)


def truncated(folder):
    path = folder / "train" / "part-00002.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def replaced_bytes(folder):
    path = folder / "valid" / "part-00000.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def missing(folder):
    (folder / "train" / "part-00001.parquet").unlink()


def changed(**values):
    """By hand: an entry within an entry is changed alone, and the checksum stays."""

    def change(folder):
        path = folder / "manifest.json"
        raw = json.loads(path.read_text())
        for name, value in values.items():
            raw[name] = raw[name] | value if isinstance(value, dict) else value
        path.write_text(json.dumps(raw))

    return change


EDITED = "manifest.json: damaged or edited (its checksum is that of other entries); copy it again, or prepare"
DAMAGE = {
    "empty folder": (nothing, "rated: not a dataset (no manifest.json)", "jobs/prepare.py"),
    "cut manifest": (manifest_of(b'{"schema": 2, "sh'), "manifest.json: damaged manifest"),
    "manifest of bytes": (manifest_of(b"\xff\xfe\x00\x01"), "manifest.json: damaged manifest"),
    "manifest of another kind": (manifest_of(b'"hello"'), "manifest.json: damaged manifest"),
    "another schema": (lambda f: edited(f, schema=7), "manifest.json: schema version 7, this program reads 6"),
    "an older schema": (
        lambda f: edited(f, schema=1),
        "schema version 1, this program reads 6; prepare the dataset again, into an empty folder",
    ),
    "edited label": (changed(label="sampledx"), EDITED),
    "edited rows": (changed(rows={"user": 7}), EDITED),
    "edited negatives": (changed(eval_negatives=3), EDITED),
    "edited checksum": (changed(checksum="0" * 64), EDITED),
    "no checksum": (changed(checksum=None), EDITED),
    "no shards": (lambda f: edited(f, shards=None), "manifest.json: damaged manifest"),
    "unknown ids": (
        lambda f: edited(f, unknown={"train": 0.25}),
        "25.0% of the training rows have an unknown user or item, more than trainer.max_unknown=0.05",
    ),
    "truncated shard": (truncated, "train/part-00002.parquet: ", "truncated or replaced"),
    "changed shard": (replaced_bytes, "valid/part-00000.parquet: its checksum differs"),
    "missing shard": (missing, "train/part-00001.parquet: not found"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_dataset(case, job, tmp_path):
    damage, *expected = DAMAGE[case]
    folder = copied(rated(), tmp_path)
    damage(folder)
    mistake(job, words(folder, "run"), *expected)


def test_source_histories_of_unknown_items(job, tmp_path):
    """conet does not read them."""
    folder = edited(copied(rated(), tmp_path), unknown={"source_history": 0.25})
    assert job(*words(folder, "run"), "--check")[0] == 0
    message = "25.0% of the items in source_history are unknown, more than trainer.max_unknown=0.05, and model "
    mistake(job, words(folder, "run", "model=minet"), message)


def test_histories_that_hold_what_is_asked_for(job, tmp_path):
    """conet does not read them, and biao's perceptron, which does, predicts nothing from them."""
    options = json.loads((rated() / "manifest.json").read_text())["options"]
    folder = edited(copied(rated(), tmp_path), options=options | {"history": "train"})
    assert job(*words(folder, "run", "recipe=biao"), "--check")[0] == 0
    for model in ("minet", "dasl"):
        mistake(
            job,
            words(folder, "run", f"model={model}", "recipe=target_only"),
            "reads target_history_item, and ",
            "history=train, whose histories hold the very item of a training row",
            "prepare the data with history=past",
        )


def test_a_changed_dataset_is_not_trained_on_from_where_it_stood(job, tmp_path):
    given = words(rated(), "run", "recipe=joint", "trainer.max_steps=3")
    assert job(*given)[0] == 0
    folder = copied(rated(), tmp_path)
    config = Path("run/config.yaml")
    config.write_text(config.read_text().replace(str(rated()), str(folder)))
    edited(folder, seed=9)
    code, _, lines = job(*words(folder, "run", "recipe=joint", "trainer.max_steps=5"))
    assert code == 2
    assert "belongs to another dataset" in lines[-1]


# ---- the run folder -------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(job):
    """A finished run of 4 steps in ./run -> its words."""
    given = words(rated(), "run", "recipe=joint", "trainer.max_steps=4")
    code, out, _ = job(*given)
    assert code == 0
    assert out.startswith("joint: test AUC 0.")
    assert out.rstrip().endswith("best step 4 of 4; " + str(Path("run").absolute()))
    return given


def test_a_run_folder_of_another_configuration(job, finished):
    mistake(job, [*finished, "dense.lr=0.5"], "run: holds a run with another configuration: dense.lr: 0.001 -> 0.5. ")
    line = mistake(job, words(rated(), "run", "trainer.max_steps=4", "recipe=biao"), "recipe.name: joint -> biao")
    assert len(line) < 300
    mistake(
        job,
        words(sampled(), "run", "trainer.max_steps=4", "recipe=joint"),
        f"data: {rated()} -> {sampled()}",
    )


def test_fewer_steps_than_before_are_refused(job, finished):
    mistake(job, [*finished, "trainer.max_steps=3"], "trainer.max_steps: 4 -> 3 (only a larger one may continue a run)")


def test_more_steps_logging_and_workers_are_not(job, finished):
    code, _, lines = job(*finished, "trainer.max_steps=6", "trainer.log_every=1", "trainer.keep=3")
    assert code == 0
    assert summary("run")["steps"] == 6
    assert [line.split()[3:5] for line in lines] == [["step", "5"], ["step", "6"], ["step", "6"]], lines


def test_a_finished_run_says_so(job, finished):
    before = files(".")
    code, out, lines = job(*finished)
    assert (code, lines) == (0, [f"{Path('run').absolute()}: already finished (4 steps)"])
    assert out.startswith("joint: test AUC 0.")
    assert {p for p, t in files(".").items() if before.get(p) != t} <= {
        Path(p) for p in ("run/config.yaml", "run/versions.json", "run")
    }


def test_a_run_folder_of_something_else(job):
    Path("run").mkdir()
    Path("run/thesis.tex").write_text("years of work")
    mistake(job, words(rated(), "run"), "run: holds something that is not a run; choose another run=")


def test_a_run_folder_that_is_a_file(job):
    Path("run").write_text("")
    mistake(job, words(rated(), "run"), "run: holds something that is not a run; choose another run=")


def test_a_run_folder_that_cannot_be_made(job):
    Path("file").write_text("")
    code, _, lines = job(*words(rated(), "file/run"))
    assert (code, len(lines)) == (2, 1), lines
    assert "file/run/lease.json: cannot be written (Not a directory)" in lines[0]


# ---- while it trains ------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_step_phase_and_table(job):
    code, _, lines = job(*words(rated(), "run", "recipe=joint", "tables.lr=3e38"))
    assert code == 2
    assert lines[-1].startswith("train: step 2 of phase train: ")
    assert "loss" in lines[-1]
    assert "table user" in lines[-1]
    assert "Lower tables.lr or dense.lr" in lines[-1]
    assert files(".") == {}, "a mended command may use the folder"


def test_an_upper_update_that_is_not_finite(job):
    code, _, lines = job(*words(rated(), "run", "recipe=biao", "hypergradient.alpha=1e30", "hypergradient.terms=9"))
    assert code == 2
    assert lines[-1].startswith("train: step 7 of phase train: ")
    assert lines[-1].endswith("Lower upper.lr or hypergradient.alpha")


# ---- --check, --help, and the contract of the real process ----------------------------------------------------------


def test_check_says_what_would_be_trained_and_starts_nothing(job):
    code, out, lines = job(*words(rated(), "run", "recipe=biao", "trainer.workers=2"), check=True)
    assert (code, lines) == (0, [])
    start = f"ok: biao on {rated()}: 1200 training rows; each of 2 worker(s) needs 0.80 GiB (tables 0.00 GiB, "
    assert out == start + "checkpoint copy 0.00 GiB, process 0.80 GiB)\n"
    assert files(".") == {}
    assert job("data=demo", check=True)[:2] == (0, "ok: biao on demo, which is written on first use\n")
    assert files(".") == {}


def test_help_shows_every_option_with_its_default():
    from omegaconf import OmegaConf

    from cdr_dist.configuration import _flat, compose_words
    from cdr_dist.help import describe_options

    text = describe_options()
    composed = _flat(OmegaConf.to_container(compose_words([])))
    for name, value in composed.items():
        if name.split(".")[0] in ("recipe", "model"):
            continue
        shown = next((line.split()[0] for line in text.splitlines() if line.startswith(f"  {name}=")), None)
        assert shown is not None, name
        if name != "run":
            assert parsed(shown.partition("=")[2]) == value, shown


def parsed(text):
    """A value as it would be typed."""
    import yaml

    value = yaml.safe_load(text)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def test_the_process_says_it_in_one_line_and_exits_with_2(tmp_path):
    folder = copied(rated(), tmp_path)
    truncated(folder)
    (tmp_path / "here").mkdir()
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / "train.py", *words(folder, "run")],
        cwd=tmp_path / "here", capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"train: {folder}/train/part-00002.parquet: ")
    assert files(tmp_path / "here") == {}


def test_the_process_prints_its_help_at_once():
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / "train.py", "--help"], capture_output=True, text=True, timeout=5
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "python jobs/train.py data=demo recipe=biao" in done.stdout


@pytest.mark.parametrize(
    ("ends", "code", "words"),
    [("print('x' * 10**7)", 141, ""), ("raise BrokenPipeError('of a worker')", 1, "BrokenPipeError: of a worker")],
    ids=["standard output", "another pipe"],
)
def test_a_reader_that_went_away(ends, code, words):
    program = f"import sys\nfrom cdr_dist.jobs import run_job\ndef main(_):\n    {ends}\n"
    program += "sys.exit(run_job('train', '', main))"
    reading, writing = os.pipe()
    if code == 141:
        os.close(reading)
    ran = subprocess.run([sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writing)
    assert ran.returncode == code
    assert (ran.stderr.strip().splitlines() or [""])[-1] == words
