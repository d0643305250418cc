"""The manifests of k8s/: valid, restricted, and their commands are ones that the jobs accept."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import re
import shlex
import shutil
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import yaml

from cdr_dist.errors import UserError
from tests import datasets, manifests
from tests.kustomize import render

ROOT = Path(__file__).parents[1]
OVERLAYS = ROOT / "k8s" / "overlays"
VARIANTS = [(accelerator, store) for accelerator in ("cpu", "gpu") for store in ("s3", "pvc")]


@functools.cache
def _rendered(accelerator, store):
    folder = OVERLAYS / accelerator
    if store == "s3":  # as in the repository
        return render(folder)
    with tempfile.TemporaryDirectory() as copied:
        shutil.copytree(ROOT / "k8s", copied, dirs_exist_ok=True)
        file = Path(copied) / "overlays" / accelerator / "kustomization.yaml"
        file.write_text(file.read_text().replace("components/s3 ", f"components/{store} "))
        return render(file.parent)


def rendered(accelerator="cpu", store="s3"):
    return copy.deepcopy(_rendered(accelerator, store))


def named(objects, kind, name):
    (one,) = [one for one in objects if one["kind"] == kind and one["metadata"]["name"] == name]
    return one


@pytest.mark.parametrize("check", manifests.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_nothing_is(check, variant):
    assert list(check(rendered(*variant))) == []


def breaking(what, value, place=("RayCluster", "cdr")):
    """Sets a field, given as a path, of one object; None removes it."""

    def change(objects):
        one = named(objects, *place)
        *way, last = [int(part) if part.isdigit() else part for part in what.split("/")]
        for part in way:
            one = one[part]
        if value is None:
            del one[last]
        else:
            one[last] = value

    return change


HEAD = "spec/headGroupSpec/template/spec/"
WORKER = "spec/workerGroupSpecs/0/template/spec/"
TRAIN, CRON = ("RayJob", "train"), ("CronJob", "nightly")
CLIENTS = ("NetworkPolicy", "ray-clients")
BROKEN = [
    ("unset_variables", breaking("spec/submitterPodTemplate/spec/containers/0/env", None, TRAIN)),
    ("unset_variables", breaking("spec/entrypoint", "python jobs/train.py data=$DATA", TRAIN)),
    ("unknown_to_the_schemas", breaking("spec/submissionMode", "K8SJobMode", TRAIN)),
    ("unknown_to_the_schemas", breaking("spec/authOptions/mode", "tokens")),
    ("unknown_to_the_schemas", breaking("spec/rayVersion", "2.60")),
    ("unknown_to_the_schemas", breaking("spec/headGroupSpec/serviceType", "Clusterip")),
    ("unknown_to_the_schemas", breaking("spec/autoscalerOptions", {"upscalingMode": "Fast"})),
    ("unknown_to_the_schemas", breaking("spec/shutdownAfterJobFinish", True, TRAIN)),
    ("unknown_to_the_schemas", breaking("spec/headGroupSpec/rayStartParams/num-cpus", 0)),
    ("unknown_to_the_schemas", breaking("spec/concurrencyPolicies", "Forbid", CRON)),
    ("unknown_to_the_schemas", breaking(HEAD + "containers/0/securityContext/readOnlyFilesystem", True)),
    ("unknown_to_the_schemas", breaking(WORKER + "terminationGracePeriodSeconds", "150")),
    ("unknown_to_the_schemas", breaking("spec/submitterPodTemplate/spec/containers/0/imag", "x", TRAIN)),
    ("not_restricted", breaking(HEAD + "securityContext/runAsUser", 0)),
    ("not_restricted", breaking(WORKER + "securityContext/runAsNonRoot", None)),
    ("not_restricted", breaking(HEAD + "securityContext/seccompProfile", {"type": "Unconfined"})),
    ("not_restricted", breaking(HEAD + "containers/0/securityContext/readOnlyRootFilesystem", False)),
    ("not_restricted", breaking(HEAD + "containers/0/securityContext/capabilities", {"add": ["SYS_PTRACE"]})),
    ("not_restricted", breaking("spec/submitterPodTemplate/spec/containers/0/securityContext", None, TRAIN)),
    ("not_restricted", breaking(WORKER + "hostNetwork", True)),
    ("unbounded", breaking(WORKER + "containers/0/resources/limits", None)),
    ("unbounded", breaking(HEAD + "containers/0/resources/requests/memory", None)),
    ("unbounded", breaking(WORKER + "volumes/0/emptyDir/sizeLimit", "20Gi")),
    ("unbounded", breaking(WORKER + "volumes/1/emptyDir", {})),
    ("unpinned_images", breaking(HEAD + "containers/0/image", "registry.example.com/cdr-dist:latest")),
    ("unpinned_images", breaking(HEAD + "containers/0/image", "cdr-dist")),
    ("secrets_in_clear", breaking(HEAD + "containers/0/env/0", {"name": "AWS_SECRET_ACCESS_KEY", "value": "abc"})),
    ("secrets_in_clear", breaking("data/endpoint", "http://me:secret@store:9000", ("ConfigMap", "cdr-storage"))),
    ("secrets_in_clear", breaking("data/AWS_SESSION_TOKEN", "abc", ("ConfigMap", "cdr-storage"))),
    ("secrets_in_clear", breaking("kind", "Secret", ("ConfigMap", "cdr-storage"))),
    ("needless_tokens", breaking(HEAD + "automountServiceAccountToken", True)),
    ("needless_tokens", breaking(WORKER + "automountServiceAccountToken", None)),
    ("needless_tokens", breaking(HEAD + "serviceAccountName", "nightly")),
    ("rights_beyond", breaking("rules/0/verbs", ["*"], ("Role", "nightly"))),
    ("rights_beyond", breaking("rules/0/resources", ["rayjobs", "secrets"], ("Role", "nightly"))),
    ("rights_beyond", breaking("kind", "ClusterRole", ("Role", "nightly"))),
    ("rights_beyond", breaking("automountServiceAccountToken", None, ("ServiceAccount", "ray"))),
    ("unprepared_ray_pods", breaking(WORKER + "terminationGracePeriodSeconds", 30)),
    ("unprepared_ray_pods", breaking(WORKER + "terminationGracePeriodSeconds", 150)),
    ("unprepared_ray_pods", breaking(HEAD + "containers/0/lifecycle", None)),
    ("unprepared_ray_pods", breaking(WORKER + "volumes/0/emptyDir/medium", None)),
    ("unprepared_ray_pods", breaking(HEAD + "containers/0/volumeMounts/1/mountPath", "/var/tmp")),
    ("careless_jobs", breaking("spec/suspend", False, TRAIN)),
    ("careless_jobs", breaking("spec/shutdownAfterJobFinishes", False, TRAIN)),
    ("careless_jobs", breaking("spec/activeDeadlineSeconds", None, TRAIN)),
    ("careless_jobs", breaking("spec/submissionMode", "HTTPMode", TRAIN)),
    ("careless_jobs", breaking("spec/concurrencyPolicy", "Allow", CRON)),
    ("careless_jobs", breaking("spec/timeZone", "Europe/Berlin", CRON)),
    ("careless_jobs", breaking("spec/startingDeadlineSeconds", None, CRON)),
    ("careless_jobs", breaking("spec/jobTemplate/spec/backoffLimit", None, CRON)),
    ("open_clusters", breaking("spec/authOptions", None)),
    ("open_clusters", breaking("spec/rayVersion", "2.59.0")),
    ("open_clusters", breaking("spec/headGroupSpec/serviceType", "LoadBalancer")),
    ("dangling", breaking(HEAD + "volumes/3/configMap/name", "files")),
    ("dangling", breaking(HEAD + "serviceAccountName", "rays")),
    ("dangling", breaking("data/AWS_REGION", None, ("ConfigMap", "cdr-storage"))),
    ("open_network", breaking("spec/policyTypes", ["Egress"], ("NetworkPolicy", "default-deny"))),
    ("open_network", breaking("spec/ingress/0/from", [], CLIENTS)),
    ("open_network", breaking("spec/ingress/0/from/0/podSelector", {}, CLIENTS)),
    ("open_network", breaking("spec/ingress/0/ports", None, CLIENTS)),
    ("open_network", breaking("spec/podSelector/matchLabels", {"app": "head"}, CLIENTS)),
    ("open_network", breaking("spec/egress/0/to", [], ("NetworkPolicy", "nightly-to-api-server"))),
]


@pytest.mark.parametrize(("name", "change"), BROKEN, ids=[f"{i}-{name}" for i, (name, _) in enumerate(BROKEN)])
def test_each_check_sees_what_it_is_for(name, change):
    objects = rendered()
    change(objects)
    assert list(getattr(manifests, name)(objects)) != []


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not there")
@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_the_renderer_renders_what_kubectl_does(accelerator):
    out = subprocess.run(["kubectl", "kustomize", OVERLAYS / accelerator], capture_output=True, text=True, check=True)

    def by_name(objects):
        return {(one["kind"], one["metadata"]["name"]): one for one in objects}

    assert by_name(rendered(accelerator)) == by_name(yaml.safe_load_all(out.stdout))


def test_the_renderer_refuses_what_it_does_not_know(tmp_path):
    (tmp_path / "kustomization.yaml").write_text("namePrefix: my-\nresources: []\n")
    with pytest.raises(AssertionError, match="namePrefix"):
        render(tmp_path)


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_only_workers_of_the_gpu_overlay_ask_for_gpus(accelerator):
    gpu = accelerator == "gpu"
    for where, pod in manifests.pods(rendered(accelerator)):
        worker = gpu and where.endswith("workers")
        (container,) = pod["spec"]["containers"]
        for kind in ("requests", "limits"):
            assert container["resources"][kind].get("nvidia.com/gpu") == ("1" if worker else None), where
        assert ("nodeSelector" in pod["spec"]) == ("tolerations" in pod["spec"]) == worker, where
    for name in ("train", "nightly"):
        entrypoint = named(rendered(accelerator), "RayJob", name)["spec"]["entrypoint"]
        assert ("trainer.device=cuda" in entrypoint) == gpu


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_a_job_and_its_driver_use_what_their_cluster_has(accelerator):
    """A driver that asks for nothing runs on the head, which gives Ray no cores and has no GPU."""
    objects = rendered(accelerator)
    there = yaml.safe_load(named(objects, "ConfigMap", "cdr-files")["data"]["nightly.yaml"])
    for name in ("train", "nightly", "recommend"):
        spec = named(objects, "RayJob", name)["spec"]
        (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        given = re.search(r"\bworkers=(\d+)", spec["entrypoint"])
        workers = int(given[1]) if given else there["trainer.workers"]
        assert workers + spec.get("entrypointNumCpus", 0) <= int(limits["cpu"]) * group["replicas"]
        used = workers + spec.get("entrypointNumCpus" if accelerator == "cpu" else "entrypointNumGpus", 0)
        assert used == int(limits["cpu" if accelerator == "cpu" else "nvidia.com/gpu"]) * group["replicas"]


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
@pytest.mark.parametrize("name", ["prepare", "evaluate", "nightly"])
def test_a_driver_that_works_itself_is_not_on_the_head(name, accelerator):
    """evaluate opens a run with the device that it was trained on; without that device it ends with a traceback."""
    spec = named(rendered(accelerator), "RayJob", name)["spec"]
    assert spec["entrypointNumCpus"] == 1
    assert spec.get("entrypointNumGpus", 0) == (accelerator == "gpu" and name != "prepare")


# Commands: every `python jobs/X.py …` of every manifest goes through that job's own check.


def commands():
    """(command, objects) of all RayJobs, each command once a store."""
    found = {}
    for variant in VARIANTS:
        for one in rendered(*variant):
            if one["kind"] == "RayJob":
                found.setdefault((one["spec"]["entrypoint"], variant[1]), variant)
    return [(command, variant) for (command, _), variant in sorted(found.items())]


def job(name):
    path = ROOT / "jobs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"job_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def checked(command, objects, tmp_path):
    """Raises what the job raises. The store is a folder that holds logs and a dataset."""
    python, script, *words = shlex.split(
        string.Template(command).safe_substitute(CDR_STORE=tmp_path, DATE="2026-11-24")
    )
    assert python == "python"
    name = re.fullmatch(r"jobs/(\w+)\.py", script)[1]
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "books-toys").symlink_to(datasets.rated())
    for domain in ("books", "toys"):
        for folder in [f"logs/{domain}"] + [f"logs/{domain}/2026-11-24"] * (name == "nightly"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / "a.csv").write_text("user_id,item_id,timestamp,rating\nu,i,1,5\nu,j,2,5\nu,k,3,5\n")
    if name == "train":
        job(name).main([*words, "trainer.memory_gb=100", "--check"])
    elif name == "prepare":
        job(name).main([w.replace("sets/books-toys", "sets/new") for w in words] + ["--check"])
    elif name == "nightly":
        text = named(objects, "ConfigMap", "cdr-files")["data"]["nightly.yaml"]
        here = re.sub(r"s3://cdr|s3://(?=logs)|(?<= )/cdr", lambda m: f"{tmp_path}" + "/" * (m[0] == "s3://"), text)
        (tmp_path / "nightly.yaml").write_text(here)
        words = [word.replace("/etc/cdr_dist", str(tmp_path)) for word in words]
        job(name).main([*words, "--check"])
    elif name in ("evaluate", "recommend"):  # ask for their run last
        with pytest.raises(UserError, match="not a run"):
            job(name).main(words)
    else:
        job(name)
        subprocess.run([sys.executable, ROOT / script, "--help"], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(("command", "variant"), commands(), ids=[f"{c.split()[1]}-{v}" for c, v in commands()])
def test_every_command_is_one_that_its_job_accepts(command, variant, tmp_path):
    checked(command, rendered(*variant), tmp_path)


@pytest.mark.parametrize(
    "command",
    [
        "python jobs/train.py data=$CDR_STORE/sets/books-toys recipe=biaoo run=$CDR_STORE/runs/biao",
        "python jobs/train.py data=$CDR_STORE/sets/books-toys trainer.worker=8 run=$CDR_STORE/runs/biao",
        "python jobs/train.py data=$CDR_STORE/sets/books-toys trainer.workers=9 run=$CDR_STORE/runs/biao",  # lanes
        "python jobs/prepare.py source=$CDR_STORE/logs/books/ target=$CDR_STORE/logs/toys/ output=$CDR_STORE/sets/a",
        "python jobs/evaluate.py run=$CDR_STORE/runs/biao splitt=test",
    ],
)
def test_a_wrong_option_is_seen(command, tmp_path):
    with pytest.raises((UserError, AssertionError)):
        checked(command, rendered(), tmp_path)


def test_no_command_hides_elsewhere():
    """All that starts a job in k8s/ is a RayJob's entrypoint, which the tests above look at."""
    entrypoints = {" ".join(command.split()) for command, _ in commands()}
    for path in (ROOT / "k8s").rglob("*.yaml"):
        for command in re.findall(r"python jobs/[^\n]*(?:\n +(?![\w]+:)[\w$.]+=[^\n]*)*", path.read_text()):
            assert " ".join(command.split()) in entrypoints, path


def test_a_job_is_started_from_its_template():
    template = json.dumps(named(rendered(), "RayJob", "train"))
    words = ["name=biao-9", "seed=9", "run=s3://cdr/runs/biao-9"]
    out = subprocess.run(
        [sys.executable, ROOT / "k8s" / "start.py", *words], input=template, capture_output=True, text=True, check=True
    )
    made = json.loads(out.stdout)
    assert made["metadata"]["name"] == "biao-9"
    assert "suspend" not in made["spec"]
    assert made["spec"]["entrypoint"] == (
        "python jobs/train.py data=$CDR_STORE/sets/books-toys recipe=biao run=s3://cdr/runs/biao-9 "
        "trainer.workers=8 seed=9"
    )
    assert list(manifests.unknown_to_the_schemas([made])) == []


def test_before_a_pod_stops_its_jobs_are_told_and_waited_for(tmp_path):
    """A driver that needs a second to write its checkpoint; a shell with the same words is not told."""
    (tmp_path / "jobs").mkdir()
    script = tmp_path / "jobs" / "pretended.py"
    script.write_text(
        "import signal, sys, time\n"
        f"def stop(*_): time.sleep(1); open({str(tmp_path / 'checkpoint')!r}, 'w'); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"open({str(tmp_path / 'ready')!r}, 'w')\n"
        "time.sleep(60)\n"
    )
    driver = subprocess.Popen([sys.executable, script])
    try:
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        code = (
            "import sys, psutil; sys.argv = ['', '20']; process_iter = psutil.process_iter\n"
            # of this machine's processes only ours, as a pod's processes are only its own
            f"psutil.process_iter = lambda names: (p for p in process_iter(names) if p.pid == {driver.pid})\n"
            "import runpy; runpy.run_path(sys.stdin.read(), run_name='__main__')"
        )
        path = ROOT / "k8s" / "base" / "ray" / "before_stop.py"
        subprocess.run([sys.executable, "-c", code], input=str(path), text=True, check=True, timeout=30)
        assert (tmp_path / "checkpoint").exists()
        assert not psutil.pid_exists(driver.pid) or driver.wait(10) == 143
    finally:
        driver.kill()
        driver.wait()
