"""What the Dockerfile, .dockerignore and .rayignore say, without Docker and without a cluster."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
IMAGE = {"cdr_dist", "jobs", "configs", "tools"}


def instructions(text=DOCKERFILE):
    """[(stage, instruction, argument)] with continued lines joined; a stage is its number."""
    text = re.sub(r"^#.*\n", "", text, flags=re.M)
    found, stage = [], -1
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.strip():
            name, _, argument = line.strip().partition(" ")
            stage += name == "FROM"
            found.append((stage, name, argument.strip()))
    return found


def last_stage():
    return [(name, argument) for stage, name, argument in instructions() if stage == instructions()[-1][0]]


def settings():
    return dict(word.split("=", 1) for name, argument in last_stage() if name == "ENV" for word in argument.split())


def ignored_by_docker(path, patterns):
    """Docker's rule: the last pattern that matches the path, or a folder above it, decides."""
    ignored = False
    parts = Path(path).parts
    above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    for pattern in patterns:
        wanted, bare = not pattern.startswith("!"), pattern.removeprefix("!").strip("/")
        names = [Path(one).name for one in above] if bare.startswith("**/") else above
        if any(
            fnmatch.fnmatchcase(name, bare.removeprefix("**/")) and ("/" in bare or "/" not in name) for name in names
        ):
            ignored = wanted
    return ignored


def docker_patterns():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def unpinned(text):
    """Base images without an exact patch version; a stage named earlier is none."""
    stages = {
        argument.split(" AS ")[1] for _, name, argument in instructions(text) if name == "FROM" and " AS " in argument
    }
    images = [argument.split(" ")[0] for _, name, argument in instructions(text) if name == "FROM"]
    return [one for one in images if one not in stages and not re.fullmatch(r"python:3\.11\.\d+-slim-\w+", one)]


def test_every_base_image_is_pinned_to_a_patch_version():
    assert unpinned(DOCKERFILE) == []
    for worse in ("python:3.11-slim", "python:latest", "python"):
        assert unpinned(DOCKERFILE.replace("python:3.11.14-slim-bookworm", worse)) == [worse, worse]


def test_the_image_runs_as_a_user_by_number_as_the_manifests_do():
    users = [argument for name, argument in last_stage() if name == "USER"]
    assert users == ["10001:10001"]
    cluster = next(yaml.safe_load_all((ROOT / "k8s/base/ray/cluster.yaml").read_text()))
    pod = cluster["spec"]["headGroupSpec"]["template"]["spec"]["securityContext"]
    assert users[0] == f"{pod['runAsUser']}:{pod['runAsGroup']}"
    (created,) = [argument for name, argument in last_stage() if name == "RUN" and "useradd" in argument]
    assert "--gid 10001 cdr" in created
    assert "--uid 10001" in created


def test_all_that_is_written_goes_where_the_pods_can_write():
    cluster = next(yaml.safe_load_all((ROOT / "k8s/base/ray/cluster.yaml").read_text()))
    pod = cluster["spec"]["headGroupSpec"]["template"]["spec"]
    empty = {volume["name"] for volume in pod["volumes"] if "emptyDir" in volume}
    writable = [one["mountPath"] for one in pod["containers"][0]["volumeMounts"] if one["name"] in empty]
    for name in ("HOME", "RAY_TMPDIR", "NUMBA_CACHE_DIR", "MPLCONFIGDIR"):
        path = settings()[name]
        assert any(path == place or path.startswith(f"{place}/") for place in writable), name
    (workdir,) = [argument for name, argument in last_stage() if name == "WORKDIR"]
    assert workdir == pod["containers"][0]["workingDir"]


def copied():
    """Sources of all COPY instructions from the folder of the project."""
    found = [argument.split() for _, name, argument in instructions() if name in ("COPY", "ADD")]
    return [source for words in found if not words[0].startswith("--from") for source in words[:-1]]


def test_what_is_copied_exists_and_reaches_docker():
    for source in copied():
        assert (ROOT / source).exists(), source
        assert not ignored_by_docker(source, docker_patterns()), source
    assert set(copied()) >= IMAGE


def test_nothing_else_reaches_docker():
    for path in (
        ".git",
        ".git/config",
        ".venv/bin/python",
        "runs/a",
        "data/a",
        "tests/test_image.py",
        "k8s/x.yaml",
        ".env",
    ):
        assert ignored_by_docker(path, docker_patterns()), path
    for path in ("cdr_dist/__pycache__/jobs.cpython-311.pyc", "cdr_dist.egg-info/PKG-INFO"):
        assert ignored_by_docker(path, docker_patterns()), path
    assert not ignored_by_docker("cdr_dist/training/job.py", docker_patterns())
    assert ignored_by_docker("tests/a.py", ["*", "!jobs"])
    assert not ignored_by_docker("tests/a.py", ["*", "!jobs", "!tests"])


def test_no_secret_and_no_index_is_in_the_image():
    assert not re.search(r"https?://|index-url|find-links|PASSWORD|TOKEN|SECRET|ACCESS_KEY", DOCKERFILE, re.I)
    assert [argument for _, name, argument in instructions() if name == "ARG"] == ["ACCEL=cpu"]


@pytest.mark.parametrize("torch", ["loads", "does not load"])
@pytest.mark.parametrize("accel", ["cpu", "gpu"])
def test_the_image_installs_what_setup_does(accel, torch, tmp_path):
    """Both run on stand-ins for uv and Python that write down what they are told."""
    code = "exit 0" if torch == "loads" else 'case "$*" in *"import torch"*) exit 1 ;; esac'
    told = {}
    (_, _, install) = next(one for one in instructions() if one[1] == "RUN" and "install()" in one[2])
    for who, script in (("image", install), ("setup", (ROOT / "tools" / "setup.sh").read_text())):
        folder = tmp_path / who
        (folder / ".venv" / "bin").mkdir(parents=True)
        (folder / "tools").mkdir()
        (folder / "tools" / "setup.sh").write_text(script)
        shutil.copytree(ROOT / "requirements", folder / "requirements")
        shutil.copy(ROOT / "pyproject.toml", folder)
        for name, body in (("uv", f'echo "$@" >> {folder}/told'), ("python", code)):
            path = folder / ".venv" / "bin" / name
            path.write_text(f"#!/bin/bash\n{body}\n")
            path.chmod(0o755)
        shell = "sh" if who == "image" else "bash"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
        ran = subprocess.run(
            [shell, "tools/setup.sh"], cwd=folder, env=environment | {"ACCEL": accel}, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        told[who] = (folder / "told").read_text().splitlines()
    own = [argument for _, name, argument in instructions() if name == "RUN" and "-e ." in argument]
    assert len(own) == 1
    (last,) = told["setup"][len(told["image"]) :]
    assert f".venv/bin/uv {last}" in own[0]
    assert told["image"] == told["setup"][:-1]
    assert all("--no-deps" in line for line in told["image"])
    assert len(told["image"]) == (2 if (accel, torch) == ("cpu", "does not load") else 1)


def test_the_installer_is_the_one_of_setup():
    version = re.search(r"uv==[\d.]+", (ROOT / "tools" / "setup.sh").read_text())[0]
    assert version in DOCKERFILE


def test_what_ray_uploads_is_small_and_whole(tmp_path):
    """Ray's own packaging on a copy of the tracked files, with what usually lies about."""
    from ray._private.runtime_env.packaging import create_package

    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folder = tmp_path / "project"
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    litter = [".git/objects/a", ".venv/bin/python", "runs/a/x.pt", "data/x.parquet", "cdr_dist/__pycache__/a.pyc"]
    litter += [".env", "cdr_dist.egg-info/PKG-INFO", "outputs/a", ".aws/credentials", "build/lib/a.py"]
    for name in litter:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(100_000))
    package = tmp_path / "package.zip"
    create_package(str(folder), package, include_parent_dir=False, include_gitignore=True)
    names = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    wanted = {name for name in tracked if name.startswith(("cdr_dist/", "jobs/", "configs/"))}
    assert wanted <= names
    assert not names & set(litter)
    assert {name.split("/")[0] for name in names if "/" in name} == IMAGE
    assert package.stat().st_size < 2_000_000
