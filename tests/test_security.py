"""docs/security.md: what may run code that came from a file, where secrets do not go, and what is known of packages."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cdr_dist.configuration import from_words, from_yaml, to_yaml
from cdr_dist.data import storage
from cdr_dist.data.prepare_job import prepare_job
from cdr_dist.data.retries import redacted
from cdr_dist.errors import UserError
from cdr_dist.jobs import run_job
from cdr_dist.production.forget_job import forget_job
from cdr_dist.production.nightly_job import nightly_job
from cdr_dist.production.options import read_words
from cdr_dist.production.recommendation_job import recommendation_job
from cdr_dist.training.job import train_job
from tests.datasets import USERS, rated, scratch
from tests.runs import words

ROOT = Path(__file__).parents[1]

# ---- what runs code -------------------------------------------------------------------------------------------------

RUNS_CODE = re.compile(
    r"(^|\.)(loads?|load_all|(unsafe|full)_load|Unpickler|read_pickle|recv|recv_bytes|\w+_object(_list)?|instantiate"
    r"|get_class|get_object|get_method|import_module|system|popen|register_new_resolver)$|^(eval|exec|__import__)$"
)
"""Names of calls that unpickle, import or run what they are given. Of `load` all but JSON's: a list is read sooner
than an alias is found out."""
ALLOWED = {
    ("cdr_dist/training/checkpoint.py", "torch.load"): "weights_only: tensors and plain values, nothing else is built",
    ("cdr_dist/training/loop.py", "self._checkpoints.load"): "our own method: reads through checkpoint.py",
    ("cdr_dist/training/checks.py", "instantiate"): "the backbone and updates that a configuration names, a run's "
    "config.yaml included: docs/security.md says that a run folder is code",
    ("cdr_dist/training/checks.py", "get_class"): "the backbone that `instantiate` is about to build",
    (
        "cdr_dist/configuration.py",
        "get_class",
    ): "the backbone that two configurations have in common, built next",
    ("cdr_dist/training/talk.py", "dist.broadcast_object_list"): "between workers of one run",
    ("cdr_dist/training/talk.py", "dist.all_gather_object"): "between workers of one run",
    ("cdr_dist/training/learned_weights.py", "dist.all_gather_object"): "between workers of one run",
    ("cdr_dist/training/memory.py", "dist.all_gather_object"): "between workers of one run",
    ("cdr_dist/training/start_vectors.py", "dist.all_gather_object"): "between workers of one run",
    ("cdr_dist/embeddings/shared_memory.py", "dist.all_gather_object"): "between workers of one run",
    ("cdr_dist/training/experiment_runs.py", "line.recv"): "from a process that this one has started",
    ("cdr_dist/training/experiment_runs.py", "process.line.recv"): "from a process that this one has started",
    ("cdr_dist/embeddings/tables.py", "dist.recv"): "numbers into a tensor",
    ("cdr_dist/data/scattered.py", "builder.load"): "an instruction of LLVM",
    (
        "cdr_dist/training/experiment_job.py",
        "load",
    ): "our own function, by yaml.safe_load",
    ("cdr_dist/configuration.py", "OmegaConf.to_object"): "builds the dataclasses of the schema, no others",
    ("tools/bench.py", "import_module"): "a benchmark of this repository, named on the command line",
}


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def sources():
    return [path for part in ("cdr_dist", "jobs", "tools", "k8s") for path in sorted((ROOT / part).rglob("*.py"))]


def test_whatever_may_run_code_from_a_file_is_on_a_list_with_a_reason():
    found = set()
    for path in sources():
        name = str(path.relative_to(ROOT))
        for function, given in calls(path):
            assert given.get("shell", "False") == "False", f"{name}: {function}(shell=…)"
            assert "allow_pickle" not in given, f"{name}: {function}(allow_pickle=…)"
            if function == "torch.load":
                assert given.get("weights_only") == "True", name
            if RUNS_CODE.search(function) and not function.startswith("json."):
                found.add((name, function))
    assert found - ALLOWED.keys() == set(), "may run code that came from a file: see ALLOWED"
    assert ALLOWED.keys() - found == set(), "is on the list and is no more"
    assert all(ALLOWED.values())


@pytest.mark.parametrize(
    ("source", "caught"),
    [
        ("import pickle\npickle.loads(x)", True),
        ("from pickle import loads\nloads(x)", True),
        ("import numpy as np\nnp.load(x)", True),
        ("import yaml\nyaml.load(x, yaml.Loader)", True),
        ("import yaml\nyaml.safe_load(x)", False),
        ("model.eval()", False),
        ("eval(x)", True),
        ("import json\njson.loads(x)", False),
    ],
)
def test_the_search_finds_such_calls(source, caught, tmp_path):
    (tmp_path / "one.py").write_text(source)
    found = [f for f, _ in calls(tmp_path / "one.py") if RUNS_CODE.search(f) and not f.startswith("json.")]
    assert bool(found) == caught


# ---- secrets --------------------------------------------------------------------------------------------------------

SECRETS = {
    "AWS_ACCESS_KEY_ID": "planted-key-id-4711",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+4711",
    "AWS_SESSION_TOKEN": "planted//session+4711",
    "RAY_AUTH_TOKEN": "planted-ray-token-4711",
    "MLFLOW_TRACKING_TOKEN": "planted-mlflow-token-4711",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-password-4711",
}


@pytest.fixture
def planted(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def test_no_job_writes_or_says_a_secret_of_its_environment(planted, tmp_path, monkeypatch, capfd):
    rated()  # writes the logs
    logs = [f"{role}={scratch() / 'rated-logs' / role}.parquet" for role in ("source", "target")]
    data, run, top = tmp_path / "data", tmp_path / "run", tmp_path / "top"
    prepare_job([*logs, f"out={data}", f"rows_per_shard={USERS}"])
    train_job(words(data, run, "recipe=joint", "trainer.max_steps=3", "trainer.report=true"))
    recommendation_job([f"run={run}", f"out={top}", "workers=0", "top=3"])
    forget_job(["user=u000100", f"data={data}", f"run={run}", f"recommendations={top}"])
    for failing in (fails, is_refused):
        monkeypatch.setattr(sys, "argv", ["job.py"])
        assert run_job("job", None, failing) in (1, 2)
    said = capfd.readouterr()
    assert "step" in said.out + said.err
    assert "Traceback" in said.err
    left = {uri: storage.read_bytes(uri) for uri in storage.files(str(tmp_path))}
    assert {f"{run}/config.yaml", f"{run}/report.html", f"{data}/manifest.json", f"{top}/recommendations.json"} < set(
        left
    )
    for where, content in (left | {"stdout": said.out.encode(), "stderr": said.err.encode()}).items():
        assert not [name for name, value in SECRETS.items() if value.encode() in content], where


def fails(_):
    raise RuntimeError(f"the client was made with {dict(os.environ)}")


def is_refused(_):
    raise UserError(f"{os.environ['RAY_AUTH_TOKEN']}: nobody should say this")


def test_no_configuration_reads_the_environment(planted):
    reading = "${oc.env:RAY_AUTH_TOKEN}"
    with pytest.raises(UserError, match=r"Unsupported interpolation type oc\.env") as error:
        from_words(["data=d", "run=r", f"recipe.name={reading}"])
    assert SECRETS["RAY_AUTH_TOKEN"] not in str(error.value)
    text = to_yaml(from_words(["data=d", "run=r", "recipe=joint"]))
    with pytest.raises(UserError, match=r"Unsupported interpolation type oc\.env"):
        from_yaml(text.replace("run: r", f"run: {reading}"))


MAINS = {
    "prepare": prepare_job,
    "train": train_job,
    "recommend": recommendation_job,
    "nightly": nightly_job,
    "forget": forget_job,
}
IN_URIS = [
    "s3://key:planted@bucket/x",
    "s3://key:plan/ted@bucket/x",
    "s3a://key:planted/x",
    "https://key:planted@host/x",
]
REFUSED = "a URI with ':' or '@' in its bucket: credentials come from the environment, not from a URI"


@pytest.mark.parametrize("uri", IN_URIS)
@pytest.mark.parametrize(
    ("job", "name", "more"),
    [
        ("prepare", "source", ["target=t.tsv", "out=o"]),
        ("prepare", "out", ["source=s.tsv", "target=t.tsv"]),
        ("train", "data", ["run=r"]),
        ("train", "tables.start.user", ["data=d", "run=r"]),
        ("train", "warm_start.run", ["data=d", "run=r"]),
        ("recommend", "items", ["run=r", "out=o"]),
        ("nightly", "source", ["date=2026-01-04", "out=o", "target=t/{date}/*"]),
        ("forget", "data", ["user=u"]),
    ],
)
def test_a_secret_in_a_uri_is_one_line_that_does_not_repeat_it(uri, job, name, more, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{job}.py", f"{name}={uri}", *more])
    assert run_job(job, None, MAINS[job]) == 2
    assert capfd.readouterr() == ("", f"{job}: {REFUSED}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", IN_URIS[:3])
def test_wherever_else_it_comes_from_it_is_refused_as_well(uri, tmp_path):
    with pytest.raises(UserError, match=re.escape(REFUSED)) as error:
        storage.read_bytes(uri)
    assert "plan" not in str(error.value)
    (tmp_path / "night.yaml").write_text(f"source: {uri}/{{date}}/*\ntarget: t/{{date}}\n")
    with pytest.raises(UserError, match=re.escape(REFUSED)):
        read_words(["date=2026-01-04", "out=o", f"config={tmp_path}/night.yaml"])


def test_names_with_such_signs_are_no_secrets(tmp_path):
    assert not storage.exists(f"{tmp_path}/me@home:8080")
    assert storage.locate("s3://bucket/user@host:1/x")[1] == "bucket/user@host:1/x"
    assert redacted("s3://bucket/user@host/x: not found") == "s3://bucket/user@host/x: not found"


# ---- packages -------------------------------------------------------------------------------------------------------


def test_the_makefile_has_its_targets_and_names_them():
    text = (ROOT / "Makefile").read_text()
    head = text.partition("export ACCEL")[0]
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.M).group(1).split())
    assert {"audit", "sbom"} <= targets == set(re.findall(r"^([a-z0-9-]+):", text, re.M))
    for target in targets - {"setup", "lint", "lock"}:
        assert f"make {target}" in head, target
    for tool in ("audit", "sbom"):
        path = ROOT / "tools" / f"{tool}.sh"
        assert os.access(path, os.X_OK)
        assert re.search(r"(pip-audit|cyclonedx-bom)[@=]+\d+\.\d+\.\d+", path.read_text()), "a fixed version"


def test_every_package_is_pinned():
    for path in (ROOT / "requirements").glob("*.txt"):
        for line in path.read_text().splitlines():
            assert re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?==[\w.+!-]+( ;.*)?", line), f"{path.name}: {line}"


def test_the_list_of_packages_holds_every_pinned_one(tmp_path):
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        pytest.skip("uv is not beside this Python (make setup)")
    command = [ROOT / "tools" / "sbom.sh", tmp_path / "sbom.json"]
    try:
        done = subprocess.run(command, env=os.environ | {"UV": str(uv)}, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        pytest.skip("the package index did not answer")
    if done.returncode:
        pytest.skip(f"cyclonedx-bom cannot be had here: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    found = json.loads((tmp_path / "sbom.json").read_text())
    assert found["bomFormat"] == "CycloneDX"
    listed = {f"{one['name']}=={one['version']}" for one in found["components"]}
    lines = [line for f in (ROOT / "requirements").glob("*.txt") for line in f.read_text().splitlines()]
    assert listed == {re.sub(r"\[.*?\]| ;.*", "", line) for line in lines}
