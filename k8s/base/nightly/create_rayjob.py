"""Creates the RayJob of one day from a template, the suspended RayJob `nightly`. Runs in the CronJob's pod.

The day comes from the name of the Job that the pod belongs to, not from the clock: a CronJob names its Jobs
NAME-<minutes since 1970 of the scheduled time>, so a retry after midnight still means its own day. A Job made by hand,
nightly-by-hand-2026-11-20, names the day itself. The RayJob of a day is created once; one that failed is created again.

Exit codes: 0 it is there, 2 these files or rights are wrong (no retry mends that), 1 anything else.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
ANSWER_S, GONE_S, PAUSE_S = 20.0, 300.0, 2.0  # waits for: an answer, a deleted job to be gone, the next look


class UserError(Exception):
    """What no retry mends."""


class ServerError(Exception):
    """What a retry may mend."""


def day_of(job_name: str, days_back: int) -> date:
    """The day that a Job's name stands for: a date of its own, or `days_back` before its scheduled minute (UTC)."""
    try:
        if found := re.search(r"-(\d{4}-\d{2}-\d{2})$", job_name):
            return date.fromisoformat(found[1])
        if (found := re.search(r"-(\d{8,9})$", job_name)) and int(found[1]) > 26_000_000:  # 2019; 20261120 is a typo
            return datetime.fromtimestamp(int(found[1]) * 60, UTC).date() - timedelta(days=days_back)
    except ValueError:
        pass
    raise UserError(f"job {job_name!r} names no day, as nightly-by-hand-2026-11-20 does")


def made_from(template: dict[str, Any], name: str, words: list[str]) -> dict[str, Any]:
    """A RayJob that runs: the template's, with words (key=value) in place of those of the same key."""
    spec = {key: value for key, value in template["spec"].items() if key != "suspend"}
    new = {word.partition("=")[0]: word for word in words}
    command = [new.pop(word.partition("=")[0], word) for word in spec["entrypoint"].split()]
    spec["entrypoint"] = " ".join([*command, *new.values()])
    labels = template["metadata"].get("labels", {})
    metadata = {"name": name, "namespace": template["metadata"]["namespace"], "labels": labels}
    return {"apiVersion": template["apiVersion"], "kind": "RayJob", "metadata": metadata, "spec": spec}


def has_failed(job: dict[str, Any]) -> bool:
    status = job.get("status", {})
    return status.get("jobDeploymentStatus") == "Failed" or status.get("jobStatus") in ("FAILED", "STOPPED")


class RayJobs:
    """The RayJobs of a namespace, asked for over the API."""

    def __init__(self, server: str, namespace: str, account: Path) -> None:
        self._url = f"{server}/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self._account = account

    def get(self, name: str) -> dict[str, Any] | None:
        code, answer = self._ask("GET", name)
        return None if code == 404 else answer

    def create(self, job: dict[str, Any]) -> bool:
        """False where one of this name is there already."""
        return self._ask("POST", "", job)[0] != 409

    def delete(self, job: dict[str, Any]) -> None:
        """This very one (by its uid), and what belongs to it."""
        only = {"preconditions": {"uid": job["metadata"]["uid"]}, "propagationPolicy": "Foreground"}
        self._ask("DELETE", job["metadata"]["name"], {"apiVersion": "v1", "kind": "DeleteOptions", **only})

    def _ask(self, method: str, name: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Codes 404 and 409 are answers, any other error is raised."""
        what = f"{method} rayjobs/{name}".rstrip("/")
        try:
            token = (self._account / "token").read_text().strip()  # read anew: the kubelet renews it
            trusted = ssl.create_default_context(cafile=str(self._account / "ca.crt"))
        except OSError as error:
            raise UserError(f"the service account's token or CA cannot be read ({error})") from error
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}/{name}".rstrip("/"), data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_S, context=trusted) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code in (404, 409) and not (error.code == 404 and method == "POST"):
                return error.code, {}
            kind = UserError if error.code in (400, 401, 403, 404, 422) else ServerError
            raise kind(f"{what}: {error.code} {_message(error)}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServerError(f"{what}: no answer from the API server ({error})") from error


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return " ".join(str(json.load(error)["message"]).split())
    except (OSError, ValueError, KeyError, TypeError):
        return str(error.reason)


def create(jobs: RayJobs, template: str, day: date) -> str:
    """What was done."""
    name = f"{template}-{day}"
    source = jobs.get(template)
    if source is None:
        raise UserError(f"there is no RayJob {template!r} to copy: apply an overlay of k8s/overlays")
    job = made_from(source, name, [f"date={day}"])
    end = time.monotonic() + GONE_S
    deleted = None
    while not jobs.create(job):
        there = jobs.get(name)
        if there is not None:
            leaving = "deletionTimestamp" in there["metadata"]
            if not leaving and not has_failed(there):
                return f"{name} is there already"
            if not leaving and deleted != there["metadata"]["uid"]:
                deleted = there["metadata"]["uid"]
                jobs.delete(there)
        if time.monotonic() > end:
            raise ServerError(f"{name} was deleted, but is still there after {GONE_S:.0f} s")
        time.sleep(PAUSE_S)
    return f"{name} created" + (" again: the earlier one had failed" if deleted else "")


def main() -> int:
    try:
        try:
            server = f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"
            day = day_of(os.environ["JOB_NAME"], int(os.environ["DAYS_BACK"]))
            jobs = RayJobs(server, os.environ["NAMESPACE"], Path(os.environ.get("ACCOUNT", ACCOUNT)))
            template = os.environ["TEMPLATE"]
            if os.environ["JOB_NAME"] == f"{template}-{day}":  # KubeRay gives this name to the Job that submits
                raise UserError(f"the job's name is that of its RayJob: call it {template}-by-hand-{day}")
        except KeyError as error:
            raise UserError(f"the variable {error.args[0]} is not set") from error
        print(create(jobs, template, day))
    except (UserError, ServerError) as error:
        print(f"create_rayjob: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
