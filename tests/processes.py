"""Runs a function on gloo workers, as Ray Train would, without Ray's half minute: one pool of processes a size.

They are forks of a process that has imported torchrec, and stay for the whole test session; every call makes its own
process group.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import socket
import tempfile
import traceback

from tests.forks import FORKS

_POOLS = {}


def on_workers(workers, function, *arguments, timeout=180):
    """function(rank, *arguments) on every worker -> the list of results by rank. A failure's traceback is raised."""
    if workers == 1:
        return [_alone(function, arguments)]
    pool = _POOLS.get(workers)
    if pool is None or not all(process.is_alive() for process, _ in pool):
        pool = _POOLS[workers] = [_start() for _ in range(workers)]
    meeting = tempfile.mktemp(prefix="cdr-workers-")  # a file: a port that was free may be somebody's a moment later
    for rank, (_, pipe) in enumerate(pool):
        pipe.send_bytes(pickle.dumps((rank, workers, meeting, function, arguments)))
    results = []
    for rank, (process, pipe) in enumerate(pool):
        try:
            waited = pipe.poll(timeout)
            ok, value = pickle.loads(pipe.recv_bytes()) if waited else (False, f"no answer in {timeout} s")
        except EOFError:
            ok, value = False, f"the process ended (exit code {process.exitcode})"
        if not ok:
            end(workers)
            raise AssertionError(f"worker {rank}:\n{value}")
        results.append(value)
    with contextlib.suppress(FileNotFoundError):
        os.remove(meeting)
    return results


def end(workers):
    """Ends the pool of this size: its workers may be in the middle of a collective."""
    for process, _ in _POOLS.pop(workers, []):
        process.kill()
        process.join()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _alone(function, arguments):
    import torch
    import torch.distributed as dist

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return function(0, *arguments)
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)


def _start():
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=_serve, args=(theirs, dict(os.environ)), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _serve(pipe, surroundings):
    import torch
    import torch.distributed as dist

    os.environ.clear()  # it is the server's, of when it began
    os.environ.update(surroundings)
    torch.set_num_threads(1)
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            try:
                rank, workers, meeting, function, arguments = pickle.loads(pipe.recv_bytes())
            except EOFError:
                return
            os.environ["LOCAL_WORLD_SIZE"] = str(workers)
            try:
                dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers)
                result = function(rank, *arguments)
                dist.barrier()
                dist.destroy_process_group()
                answer = pickle.dumps((True, result))
            except Exception:
                answer = pickle.dumps((False, traceback.format_exc()))
            pipe.send_bytes(answer)


@atexit.register
def _end_all():
    for workers in list(_POOLS):
        end(workers)
