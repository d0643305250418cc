"""An S3 server for tests behind a proxy that breaks answers: fixtures (tests/conftest.py names them) and helpers.

The server is moto's, or a real one that CDR_TEST_S3 names (`make test-s3`).
"""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

import pyarrow as pa
import pytest
from moto.server import ThreadedMotoServer

from cdr_dist.data import storage
from cdr_dist.data.options import StorageOptions
from tests.datasets import rated, scratch
from tests.faulty_store import FaultyStore
from tests.runs import summary, train, words

ROOT = Path(__file__).parents[1]
PLANTED = {
    "AWS_ACCESS_KEY_ID": "planted-key-id-0123",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+0123456789",
    "AWS_SESSION_TOKEN": "planted//token+0123456789",
}
QUICK = StorageOptions(deadline_s=10.0, tries=4, backoff_s=0.02)
QUICK_WORDS = ["storage.deadline_s=10", "storage.tries=4", "storage.backoff_s=0.02"]
FAULTS = ["reset", "stall", "trickle", "lost", "truncate", "short", "500", "502", "503"]
FAST_FAULTS = [fault for fault in FAULTS if fault not in ("stall", "trickle")]


@pytest.fixture(scope="module")
def proxy():
    """The proxy before the store; the environment of this process names it. The bucket is named `bucket`."""
    with pytest.MonkeyPatch.context() as patch:
        server = None
        if real := os.environ.get("CDR_TEST_S3"):
            host, _, port = real.removeprefix("http://").partition(":")
        else:
            server = ThreadedMotoServer(port=0, verbose=False)
            server.start()
            host, port = server.get_host_and_port()
            for name, value in PLANTED.items():
                patch.setenv(name, value)
        store = FaultyStore(host, int(port))
        patch.setenv("AWS_ENDPOINT_URL", store.url)
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        # Many stores send no checksums; where they do, the client would notice damage before we can.
        patch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
        make_bucket()
        yield store
        store.close()
        if server is not None:
            server.stop()


def make_bucket():
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    if not fs.exists("bucket"):
        fs.mkdir("bucket")


@pytest.fixture
def store(proxy):
    """The proxy without a fault, and short deadlines."""
    rated()  # made by prepare, with storage options of its own
    before = storage.options()
    proxy.reset()
    storage.use(QUICK)
    yield proxy
    proxy.reset()
    storage.use(before)


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path, store):
    """The URI of an empty folder."""
    uri = str(tmp_path) if request.param == "local" else fresh(request)
    yield uri
    storage.remove_folder(uri)


@pytest.fixture
def s3(request, store):
    uri = fresh(request)
    yield uri
    store.reset()
    storage.remove_folder(uri)


def fresh(request):
    return f"s3://bucket/{request.node.name.replace('[', '-').replace(']', '')}"


def scripted(faults):
    """These faults for the first requests, then none."""
    left = deque(faults)
    return lambda request: left.popleft() if left else None


def upload(local, uri):
    for file in sorted(Path(local).rglob("*")):
        if file.is_file():
            storage.write_bytes(storage.join(uri, str(file.relative_to(local))), file.read_bytes())
    return uri


def uploads_under_way():
    import s3fs

    return s3fs.S3FileSystem(skip_instance_cache=True).list_multipart_uploads("bucket")


RECIPE = ["recipe=joint", "trainer.max_steps=25"]


@pytest.fixture(scope="module")
def undisturbed():
    """Of a local run."""
    run = scratch() / "undisturbed"
    train(words(rated(), run, *RECIPE))
    return summary(run)


def rows_of(reader):
    from cdr_dist.data.lanes import Piece

    return pa.concat_tables([reader.read(Piece(i, 0, n)) for i, n in enumerate(reader.row_groups)])
