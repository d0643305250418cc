"""What a reviewer would look for in rendered manifests. Each function returns what is wrong, a line for each."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import kubernetes_validate

KUBERNETES = "1.33"
K8S = Path(__file__).parents[1] / "k8s"
SCHEMA = json.loads((K8S / "schema" / "kuberay.json").read_text())
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|ACCESS_KEY|PRIVATE", re.I)
ONLY_SECRETS = re.compile(r"AKIA[0-9A-Z]{16}|-----BEGIN|://[^/\s]+:[^/\s]+@")
WRITABLE = {"/tmp", "/home/cdr"}
NEEDS_TOKEN = {"nightly"}  # service accounts


def pods(objects):
    """(where, pod template) of all pods that the objects will make."""
    for one in objects:
        where, spec = f"{one['kind']} {one['metadata']['name']}", one.get("spec", {})
        if one["kind"] == "CronJob":
            yield where, spec["jobTemplate"]["spec"]["template"]
        if one["kind"] == "RayJob":
            yield f"{where} submitter", spec["submitterPodTemplate"]
        if one["kind"] in ("RayJob", "RayCluster"):
            cluster = spec.get("rayClusterSpec", spec)
            yield f"{where} head", cluster["headGroupSpec"]["template"]
            for group in cluster["workerGroupSpecs"]:
                yield f"{where} {group['groupName']}", group["template"]


def containers(objects):
    for where, pod in pods(objects):
        for one in pod["spec"]["containers"] + pod["spec"].get("initContainers", []):
            yield f"{where}: {one['name']}", pod["spec"], one


def unknown_to_the_schemas(objects):
    for one in objects:
        where = f"{one['kind']} {one['metadata']['name']}"
        if one["apiVersion"].startswith("ray.io/"):
            schema = {"$defs": SCHEMA["$defs"], "$ref": f"#/$defs/{one['kind']}"}
            for error in jsonschema.Draft202012Validator(schema).iter_errors(one):
                yield f"{where}: {error.json_path}: {error.message[:200]}"
        else:
            yield from _unknown_to_kubernetes(where, one)
    for where, pod in pods(objects):
        if not where.startswith("CronJob"):
            template = {"metadata": pod.get("metadata", {}), "spec": pod["spec"]}
            one = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
            yield from _unknown_to_kubernetes(where, one)


_valid = set()  # a job's pods are mostly those of another one


def _unknown_to_kubernetes(where, one):
    content = json.dumps(one, sort_keys=True)
    if content in _valid:
        return
    try:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
        _valid.add(content)
    except kubernetes_validate.ValidationError as error:
        yield f"{where}: {'.'.join(str(part) for part in error.path)}: {error.message[:200]}"


def not_restricted(objects):
    """Pods that may be root, gain rights, or write to their image."""
    for where, pod in pods(objects):
        context = pod["spec"].get("securityContext", {})
        if not (context.get("runAsNonRoot") is True and context.get("runAsUser") == context.get("runAsGroup") == 10001):
            yield f"{where}: does not run as 10001"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{where}: seccompProfile"
        if any(pod["spec"].get(field) for field in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{where}: is on its host"
        if any("hostPath" in volume for volume in pod["spec"].get("volumes", [])):
            yield f"{where}: mounts its host"
    for where, _, one in containers(objects):
        wanted = {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
        }
        if one.get("securityContext") != wanted:
            yield f"{where}: securityContext"


def unbounded(objects):
    """Containers without requests and limits; memory volumes that exceed theirs."""
    for where, pod, one in containers(objects):
        resources = one.get("resources", {})
        for kind in ("requests", "limits"):
            for what in ("cpu", "memory", "ephemeral-storage"):
                if what not in resources.get(kind, {}):
                    yield f"{where}: no {kind} of {what}"
        for volume in pod.get("volumes", []):
            empty = volume.get("emptyDir")
            if empty is not None and "sizeLimit" not in empty:
                yield f"{where}: the volume {volume['name']} has no sizeLimit"
            elif empty and empty.get("medium") == "Memory":
                limit = resources.get("limits", {}).get("memory", "0Gi")
                if int(empty["sizeLimit"].removesuffix("Gi")) > int(limit.removesuffix("Gi")) / 2:
                    yield f"{where}: {volume['name']} may fill more than half of the container's memory"


def unpinned_images(objects):
    for where, _, one in containers(objects):
        if not re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", one["image"]):
            yield f"{where}: the image {one['image']} is not pinned"


def secrets_in_clear(objects):
    for one in objects:
        if one["kind"] == "Secret":
            yield f"Secret {one['metadata']['name']} is in the manifests"
        elif found := ONLY_SECRETS.search(json.dumps(one)):
            yield f"{one['kind']} {one['metadata']['name']}: {found[0][:8]}… looks like a secret"
        for key in one.get("data", {}) if one["kind"] == "ConfigMap" else ():
            if SECRET.search(key):
                yield f"ConfigMap {one['metadata']['name']}: {key}"
    for where, _, one in containers(objects):
        for variable in one.get("env", []):
            if SECRET.search(variable["name"]) and "secretKeyRef" not in variable.get("valueFrom", {}):
                yield f"{where}: {variable['name']} does not come from a Secret"


def needless_tokens(objects):
    for where, pod in pods(objects):
        wanted = pod["spec"].get("serviceAccountName") in NEEDS_TOKEN
        if pod["spec"].get("automountServiceAccountToken") is not wanted:
            yield f"{where}: automountServiceAccountToken should be {wanted}"


def rights_beyond(objects):
    """Rights other than those of the nightly account on the RayJobs of its namespace."""
    for one in objects:
        if one["kind"].startswith("Cluster"):
            yield f"{one['kind']} {one['metadata']['name']}: rights in every namespace"
        if one["kind"] == "Role":
            wanted = [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get", "delete"]}]
            if one["rules"] != wanted or one["metadata"]["name"] != "nightly":
                yield f"Role {one['metadata']['name']}: {one['rules']}"
        if one["kind"] == "ServiceAccount" and one.get("automountServiceAccountToken") is not False:
            yield f"ServiceAccount {one['metadata']['name']}: its token is mounted by itself"


def ray_pods(objects):
    return [(where, pod) for where, pod in pods(objects) if pod["metadata"]["labels"].get("cdr-dist/ray") == "true"]


def unprepared_ray_pods(objects):
    """Ray's pods that cannot write where they must, or are killed before a checkpoint is written."""
    for where, pod in ray_pods(objects):
        spec = pod["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for one in spec["containers"]:
            mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in one["volumeMounts"]}
            if mounted.get("/dev/shm", {}).get("emptyDir", {}).get("medium") != "Memory":
                yield f"{where}: /dev/shm is not in memory"
            for path in WRITABLE:
                if "emptyDir" not in mounted.get(path, {}):
                    yield f"{where}: {path} cannot be written"
            *_, patience = one.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["0"])
            if (
                not 60 < int(patience) < spec.get("terminationGracePeriodSeconds", 30) - 30
            ):  # Ray drains its node for 30 s
                yield f"{where}: is killed before preStop has waited for a checkpoint"


def careless_jobs(objects):
    """RayJobs that run by themselves, for ever, or leave their cluster behind; CronJobs that pile up."""
    for one in objects:
        where, spec = f"{one['kind']} {one['metadata']['name']}", one.get("spec", {})
        if one["kind"] == "RayJob":
            wanted = {"suspend": True, "submissionMode": "K8sJobMode", "shutdownAfterJobFinishes": True}
            yield from (f"{where}: {key} is not {value}" for key, value in wanted.items() if spec.get(key) != value)
            for key in ("activeDeadlineSeconds", "ttlSecondsAfterFinished", "backoffLimit"):
                if not 0 < spec.get(key, 0) <= 86400:
                    yield f"{where}: {key}"
        if one["kind"] == "CronJob":
            wanted = {"concurrencyPolicy": "Forbid", "timeZone": "Etc/UTC"}
            yield from (f"{where}: {key} is not {value}" for key, value in wanted.items() if spec.get(key) != value)
            for key in ("startingDeadlineSeconds", "successfulJobsHistoryLimit", "failedJobsHistoryLimit"):
                if not spec.get(key):
                    yield f"{where}: {key}"
            for key in ("backoffLimit", "activeDeadlineSeconds"):
                if not spec["jobTemplate"]["spec"].get(key):
                    yield f"{where}: {key}"


def open_clusters(objects):
    """Clusters without a token, of another Ray than the image's, or reachable from outside."""
    pinned = re.search(r"^ray==(\S+)$", (K8S.parent / "requirements" / "base.txt").read_text(), re.M)[1]
    for one in objects:
        if one["kind"] in ("RayJob", "RayCluster"):
            where = f"{one['kind']} {one['metadata']['name']}"
            cluster = one["spec"].get("rayClusterSpec", one["spec"])
            if cluster.get("authOptions") != {"mode": "token"}:
                yield f"{where}: needs no token"
            if cluster["rayVersion"] != pinned:
                yield f"{where}: Ray {cluster['rayVersion']}, the image has {pinned}"
            if cluster["headGroupSpec"].get("serviceType") != "ClusterIP":
                yield f"{where}: its head can be reached from outside"


def dangling(objects):
    """Names of ConfigMaps, accounts, claims and keys that are not there. Secrets are made by hand, all but one name."""
    there = {(one["kind"], one["metadata"]["name"]): one for one in objects}
    for where, pod in pods(objects):
        if ("ServiceAccount", pod["spec"]["serviceAccountName"]) not in there:
            yield f"{where}: no account {pod['spec']['serviceAccountName']}"
        for volume in pod["spec"].get("volumes", []):
            for field, kind, key in (
                ("configMap", "ConfigMap", "name"),
                ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
            ):
                if field in volume and (kind, volume[field][key]) not in there:
                    yield f"{where}: no {kind} {volume[field][key]}"
    for where, _, one in containers(objects):
        for variable in one.get("env", []):
            source = variable.get("valueFrom", {})
            if "configMapKeyRef" in source:
                reference = source["configMapKeyRef"]
                if reference["key"] not in there.get(("ConfigMap", reference["name"]), {}).get("data", {}):
                    yield f"{where}: no key {reference['key']} in ConfigMap {reference['name']}"
            if source.get("secretKeyRef", {}).get("name", "cdr-storage") != "cdr-storage":
                yield f"{where}: an unknown Secret {source['secretKeyRef']['name']}"


def open_network(objects):
    """What may come in, other than wanted; policies that choose no pod."""
    policies = {one["metadata"]["name"]: one["spec"] for one in objects if one["kind"] == "NetworkPolicy"}
    if policies.get("default-deny") != {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}:
        yield "no default-deny"
    labels = [pod["metadata"]["labels"] for _, pod in pods(objects)]
    for name, policy in policies.items():
        wanted = policy["podSelector"].get("matchLabels", {})
        if not any(wanted.items() <= one.items() for one in labels):
            yield f"{name}: chooses no pod"
        for rule in policy.get("ingress", []):
            if not rule.get("from"):
                yield f"{name}: lets everybody in"
            for peer in rule.get("from", []):
                chosen = peer.get("podSelector", {}).get("matchLabels", {})
                if not chosen or "ipBlock" in peer:
                    yield f"{name}: lets pods in that have no label"
                elif chosen != {"cdr-dist/ray": "true"} and {p["port"] for p in rule.get("ports", [{"port": 0}])} - {
                    8265,
                    10001,
                    6379,
                }:
                    yield f"{name}: opens more than three ports to {chosen}"
        for rule in policy.get("egress", []):
            if not rule.get("to"):
                yield f"{name}: lets everything out"
    if not any("ingress" in policy for policy in policies.values()):
        yield "nobody reaches Ray"


def unset_variables(objects):
    """Variables of a command that neither the submitter's shell nor, in other modes, the head's knows."""
    for one in objects:
        if one["kind"] == "RayJob":
            head = one["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
            for pod in (one["spec"]["submitterPodTemplate"], head):
                (container,) = pod["spec"]["containers"]
                known = {variable["name"] for variable in container.get("env", [])} | {"DATE"}  # create_rayjob.py's
                for name in sorted(set(re.findall(r"\$\{?(\w+)", one["spec"]["entrypoint"])) - known):
                    yield f"RayJob {one['metadata']['name']}: ${name} is not set in {container['name']}"


CHECKS = [
    unset_variables,
    unknown_to_the_schemas,
    not_restricted,
    unbounded,
    unpinned_images,
    secrets_in_clear,
    needless_tokens,
    rights_beyond,
    unprepared_ray_pods,
    careless_jobs,
    open_clusters,
    dangling,
    open_network,
]
