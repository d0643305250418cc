"""Messages of workers on one machine against torch.distributed's; workers that end or hang; no way to share memory."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import time

import pytest
import torch
import torch.distributed as dist

from cdr_dist.embeddings import workers
from cdr_dist.embeddings.shared_memory import SharedMemory, WorkerLostError, _Box
from tests.datasets import rated
from tests.problem import replaced
from tests.processes import on_workers
from tests.runs import same_run, train, words

DTYPES = (torch.float32, torch.float64, torch.int64)


def messages(rank, count):
    """Exchanges and sums whose sizes every worker draws alike, each compared with torch.distributed's."""
    world, same = dist.get_world_size(), torch.Generator().manual_seed(3)
    shared = SharedMemory.between(dist.group.WORLD)
    assert shared is not None
    seen = 0
    for turn in range(count):
        most = int(torch.randint(0, 2 ** (turn % 12) + 1, (), generator=same))
        sizes = torch.randint(0, most + 1, (world, world), generator=same)
        dtype, shape = DTYPES[turn % 3], [(), (3,), (2, 5)][turn // 3 % 3]
        out, into = sizes[rank].tolist(), sizes[:, rank].tolist()
        values = torch.randint(-99, 99, (sum(out), *shape)).to(dtype)
        expected = values.new_empty(sum(into), *shape)
        dist.all_to_all_single(expected, values, into, out)
        assert torch.equal(shared.exchange(values, out, into), expected)
        ours = torch.randint(-99, 99, (most, *shape)).to(dtype)
        expected = ours.clone()
        dist.all_reduce(expected)
        shared.sum_(ours)
        assert torch.equal(ours, expected)
        strided = torch.arange(6, dtype=dtype).view(2, 3).T
        shared.sum_(strided)
        assert torch.equal(strided, world * torch.arange(6, dtype=dtype).view(2, 3).T)
        seen += most
    shared.close()
    return seen


@pytest.mark.parametrize("count", [2, 3])
def test_messages_are_those_of_torch_distributed(count):
    assert all(seen > 1000 for seen in on_workers(count, messages, 60))


def sums_of_a_slow_reader(rank):
    shared = SharedMemory.between(dist.group.WORLD)
    came = shared._came
    shared._came = lambda *of: (time.sleep(0.02 * rank), came(*of))[1]
    found = []
    for i in range(8):
        x = torch.full((1000,), float(10 * i + rank))
        shared.sum_(x)
        found.append(x.unique().tolist())
    shared.close()
    return found


def test_a_message_stays_until_the_slowest_has_read_it():
    right = [[20.0 * i + 1] for i in range(8)]
    assert on_workers(2, sums_of_a_slow_reader) == [right, right]


def other_worker(pipe, ends):
    box = _Box.made(2)
    pipe.send(box.place)
    pipe.recv()
    if not ends:
        time.sleep(60)


@pytest.mark.parametrize("ends", [True, False])
def test_a_worker_that_ends_or_hangs_is_noticed(ends):
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=other_worker, args=(theirs, ends), daemon=True)
    process.start()
    try:
        shared = SharedMemory(0, [_Box.made(2), _Box.found(pipe.recv())], patience_s=60.0 if ends else 0.5)
        pipe.send("go on")
        start = time.monotonic()
        with pytest.raises(WorkerLostError, match="worker 1 has ended" if ends else "within 0.5 s"):
            shared.sum_(torch.zeros(3))
        assert time.monotonic() - start < 30
        shared.close()
    finally:
        process.kill()
        process.join()


def without_reach(rank):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.MonkeyPatch.context() as patched:
        if rank == 1:
            patched.setattr(_Box, "found", unreachable)
        assert SharedMemory.between(dist.group.WORLD) is None
        assert len(os.listdir("/proc/self/fd")) == before
        x = torch.ones(2)
        workers.sum_(x)
    return x.tolist(), workers.exchange(torch.tensor([rank, rank + 10]), [1, 1], [1, 1]).tolist()


def unreachable(_place):
    raise OSError("elsewhere")


def test_without_shared_memory_messages_go_through_torch_distributed():
    assert on_workers(2, without_reach) == [([2.0, 2.0], [0, 1]), ([2.0, 2.0], [10, 11])]


def different_messages(rank):
    shared = SharedMemory.between(dist.group.WORLD)
    try:
        shared.sum_(torch.zeros(3 + rank * 100))
    except RuntimeError as error:
        return str(error)


def test_workers_that_send_different_messages_are_told():
    assert "different messages" in on_workers(2, different_messages)[0]


def test_another_process_of_the_same_number_is_not_taken_for_a_worker():
    box = _Box.made(2)
    process, files, token = box.place
    assert _Box.found(box.place) is not None
    with pytest.raises(OSError, match="another process"):
        _Box.found((process, files, token + 1))


def test_nothing_stays_open():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        own = _Box.made(1)
        shared = SharedMemory(0, [own, _Box.found(own.place)], 1.0)
        shared.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_run_ends_with_the_same_bits_with_and_without(tmp_path):
    for way in ("true", "false"):
        more = ["recipe=biao", f"trainer.shared_memory={way}"]
        train(words(rated(), tmp_path / way, *more), 2, within=functools.partial(used, way == "true"))
    same_run(tmp_path / "true", tmp_path / "false")


@contextlib.contextmanager
def used(expected):
    """Whether messages of a worker go through shared memory."""
    calls, real = [], SharedMemory._send
    with replaced(SharedMemory, "_send", lambda self: calls.append(1) or real(self)):
        yield
    assert bool(calls) == expected


def test_a_descriptor_of_a_large_number_is_watched():
    box = _Box.made(2)
    process, files, token = box.place
    taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        other = _Box.found((process, files, token))
        assert other._process > 1023
        assert not other.ended()
        other.close()
    finally:
        for file in taken:
            os.close(file)
