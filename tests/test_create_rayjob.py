"""k8s/base/nightly/create_rayjob.py against an API server on loopback: one RayJob a day, whatever happens."""

from __future__ import annotations

import datetime
import ipaddress
import json
import ssl
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests import manifests
from tests.kustomize import render

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "k8s" / "base" / "nightly" / "create_rayjob.py"
PATH = "/apis/ray.io/v1/namespaces/cdr-dist/rayjobs"
MINUTES = int(datetime.datetime(2026, 11, 25, 2, 30, tzinfo=datetime.UTC).timestamp()) // 60


class Server(ThreadingHTTPServer):
    """The RayJobs of one namespace over HTTPS. refuses: the code that every request gets instead."""

    def __init__(self, certificate):
        super().__init__(("127.0.0.1", 0), Answers)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        template = [one for one in render(ROOT / "k8s/overlays/cpu") if one["metadata"]["name"] == "nightly"]
        self.jobs = {"nightly": next(one for one in template if one["kind"] == "RayJob")}
        self.asked, self.refuses, self.lingers = [], None, 0

    def handle_error(self, *_):
        """A client that does not trust us is no news."""


class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.rpartition("/")[2]
        job = self.server.jobs.get(name)
        if job and "deletionTimestamp" in job["metadata"]:
            self.server.lingers -= 1
            if self.server.lingers < 0:
                job = self.server.jobs.pop(name) and None
        self.answer(200, job) if job else self.answer(404, {"message": "not found"})

    def do_POST(self):
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = job["metadata"]["name"]
        if name in self.server.jobs:
            self.answer(409, {"message": "already exists"})
        else:
            job["metadata"]["uid"] = f"uid-{len(self.server.asked)}"
            self.answer(201, job, lambda: self.server.jobs.update({name: job}))

    def do_DELETE(self):
        job = self.server.jobs[self.path.rpartition("/")[2]]
        options = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert options["preconditions"] == {"uid": job["metadata"]["uid"]}
        self.answer(200, {}, lambda: job["metadata"].update(deletionTimestamp="now"))

    def answer(self, code, body, do=lambda: None):
        self.server.asked.append((self.command, self.path))
        if self.headers["Authorization"] != "Bearer a-token":
            code, body = 401, {"message": "Unauthorized"}
        elif self.server.refuses:
            code, body = self.server.refuses, {"message": "rayjobs.ray.io is forbidden:\n cannot create"}
        else:
            do()
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Nothing on the screen."""


def certificate():
    """(certificate, private key) of an API server on loopback that is its own CA, in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "api")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - day, now + day)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .sign(key, hashes.SHA256())
    )
    form, pem = serialization.PrivateFormat.PKCS8, serialization.Encoding.PEM
    return made.public_bytes(pem), key.private_bytes(pem, form, serialization.NoEncryption())


@pytest.fixture(scope="module")
def account(tmp_path_factory):
    """A folder as a pod's service account: token and ca.crt; server.pem beside them."""
    folder = tmp_path_factory.mktemp("account")
    public, private = certificate()
    (folder / "ca.crt").write_bytes(public)
    (folder / "server.pem").write_bytes(private + public)
    (folder / "token").write_text("a-token\n")
    return folder


@pytest.fixture
def server(account):
    server = Server(account / "server.pem")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def run(server, account, job=f"nightly-{MINUTES}", port=None, patience=20.0):
    """The script as in its pod, with shorter waits."""
    waits = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import create_rayjob as c; "
    waits += f"c.GONE_S, c.PAUSE_S = {patience}, 0.02; sys.exit(c.main())"
    environment = {
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT": str(port or server.server_port),
        "JOB_NAME": job,
        "NAMESPACE": "cdr-dist",
        "TEMPLATE": "nightly",
        "DAYS_BACK": "1",
        "ACCOUNT": str(account),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    out = subprocess.run(
        [sys.executable, "-S", "-c", waits], env=environment, capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in out.stderr, out.stderr
    assert len((out.stdout + out.stderr).splitlines()) == 1
    return out.returncode, (out.stdout + out.stderr).strip()


def test_the_job_of_the_day_that_has_ended_is_created(server, account):
    assert run(server, account) == (0, "nightly-2026-11-24 created")
    made = server.jobs["nightly-2026-11-24"]
    assert made["spec"]["entrypoint"] == "python jobs/nightly.py date=2026-11-24 config=/etc/cdr_dist/nightly.yaml"
    assert "suspend" not in made["spec"]
    del made["metadata"]["uid"]
    assert list(manifests.unknown_to_the_schemas([made])) == []


def test_a_second_call_leaves_the_job_alone(server, account):
    run(server, account)
    before = json.dumps(server.jobs)
    assert run(server, account) == (0, "nightly-2026-11-24 is there already")
    assert json.dumps(server.jobs) == before


@pytest.mark.parametrize(
    "status",
    [{"jobDeploymentStatus": "Failed"}, {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}],
    ids=["failed", "stopped"],
)
def test_a_job_that_failed_is_created_again_once_it_is_gone(server, account, status):
    run(server, account)
    first = server.jobs["nightly-2026-11-24"]
    first["status"], server.lingers = status, 3
    assert run(server, account) == (0, "nightly-2026-11-24 created again: the earlier one had failed")
    assert server.jobs["nightly-2026-11-24"]["metadata"]["uid"] != first["metadata"]["uid"]
    assert [method for method, _ in server.asked].count("DELETE") == 1


def test_a_job_that_has_succeeded_or_runs_is_not_touched(server, account):
    run(server, account)
    for status in ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, {"jobDeploymentStatus": "Running"}):
        server.jobs["nightly-2026-11-24"]["status"] = status
        assert run(server, account) == (0, "nightly-2026-11-24 is there already")


def test_a_job_that_will_not_go_is_waited_for_so_long_only(server, account):
    run(server, account)
    server.jobs["nightly-2026-11-24"]["status"], server.lingers = {"jobDeploymentStatus": "Failed"}, 10**9
    code, said = run(server, account, patience=0.2)
    assert code == 1
    assert "was deleted, but is still there" in said


def test_a_date_in_the_name_is_that_day(server, account):
    assert run(server, account, "nightly-by-hand-2026-11-03") == (0, "nightly-2026-11-03 created")


def test_a_name_that_kuberay_needs_is_refused(server, account):
    """Its own Job, which submits, has the name of the RayJob."""
    code, said = run(server, account, "nightly-2026-11-03")
    assert code == 2
    assert "call it nightly-by-hand-2026-11-03" in said
    assert server.asked == []


@pytest.mark.parametrize("name", ["nightly", "nightly-2026-13-40", "nightly-7", "nightly-by-hand-20261120"])
def test_a_name_without_a_day_is_the_users_mistake(server, account, name):
    code, said = run(server, account, name)
    assert code == 2
    assert f"job '{name}' names no day" in said
    assert server.asked == []


@pytest.mark.parametrize(("refusal", "code"), [(403, 2), (401, 2), (422, 2), (429, 1), (500, 1), (503, 1)])
def test_a_refusal_is_one_line_and_a_code(server, account, refusal, code):
    server.refuses = refusal
    said = f"create_rayjob: GET rayjobs/nightly: {refusal} rayjobs.ray.io is forbidden: cannot create"
    assert run(server, account) == (code, said)


def test_a_server_that_is_down_is_worth_a_retry(server, account):
    code, said = run(server, account, port=1)
    assert code == 1
    assert "no answer from the API server" in said


def test_no_template_is_the_users_mistake(server, account):
    server.jobs.clear()
    code, said = run(server, account)
    assert code == 2
    assert "there is no RayJob 'nightly' to copy" in said


def test_a_server_of_another_ca_is_not_told_the_token(server, account, tmp_path):
    (tmp_path / "ca.crt").write_bytes(certificate()[0])
    (tmp_path / "token").write_text("a-token")
    code, said = run(server, tmp_path)
    assert code == 1
    assert "CERTIFICATE_VERIFY_FAILED" in said
    assert server.asked == []


def test_without_token_or_ca_it_says_so(server, tmp_path):
    code, said = run(server, tmp_path)
    assert code == 2
    assert "token or CA cannot be read" in said
