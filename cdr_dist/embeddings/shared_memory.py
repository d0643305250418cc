"""Messages between the workers of one machine through memory that they share.

A message through gloo's sockets passes several threads and the kernel: between two busy cores of a virtual machine it
takes .8 ms and more, however small, and as much of the processors' time (docs/performance.md). Here a worker writes its
message where the others read it, and says so by a number that they watch.

The memory comes from memfd_create and is found by way of /proc, so that nothing is left behind, whatever ends a worker,
and no file system's size limits it.
"""

from __future__ import annotations

import mmap
import os
import secrets
import select
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from cdr_dist.compiled import compiled

ALIGNED = 64
"""Bytes: a cache line, where each part of a message begins."""
LOOKS = 10_000
"""How often a worker looks for a message before it lets others have the processor: some 10 microseconds."""
YIELDING_S, NAP_S = 0.002, 0.0002
"""How long it then only yields, and how long it sleeps at a time after that."""
ALIVE_EVERY_S = 0.1
_SENT, _TOKEN, _SLOTS = 0, 1, 8
"""Where a control block holds: how many messages were sent; a random number; of the last two, kind and parts' edges."""
EXCHANGE, SUM = range(2)


class WorkerLostError(RuntimeError):
    """A worker ended, or did not come to a message within the time that the process group allows."""


class SharedMemory:
    """This worker's end. All workers make one together (`between`) and call the same methods in the same order.

    Message s lies in slot s % 2 of its sender. A worker overwrites a slot when it sends message s + 2; by then all
    others have sent s + 1, and so have read s.
    """

    def __init__(self, rank: int, boxes: Sequence[_Box], patience_s: float) -> None:
        self._rank, self._boxes, self._patience_s = rank, boxes, patience_s
        self._message = 0

    @classmethod
    def between(cls, group: Any) -> SharedMemory | None:
        """For all workers of a group, or None where one of them cannot reach another one's memory."""
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        boxes: list[_Box] = []
        try:
            own = _Box.made(world)
            boxes.append(own)
        except (OSError, AttributeError):  # not Linux
            own = None
        places: list[Any] = [None] * world
        dist.all_gather_object(places, own.place if own else None, group=group)
        with suppress(OSError):  # another machine, container or user
            for r, place in enumerate(places):
                if r != rank and place is not None and own is not None:
                    boxes.append(_Box.found(place))
        answers: list[bool] = [False] * world
        dist.all_gather_object(answers, len(boxes) == world, group=group)
        if all(answers):
            patience = group._get_backend(torch.device("cpu")).options._timeout
            return cls(rank, [*boxes[1 : rank + 1], boxes[0], *boxes[rank + 1 :]], patience.total_seconds())
        for box in boxes:
            box.close()
        return None

    def exchange(self, values: Tensor, out: Sequence[int], into: Sequence[int]) -> Tensor:
        """Part w of `values` [n, ..], out[w] rows, goes to worker w; of the result, into[w] rows came from it."""
        values = values.contiguous()
        found = values.new_empty(sum(into), *values.shape[1:])
        parts = values.split(list(out))
        edges = [0]
        for w, part in enumerate(parts):
            edges.append(_aligned(edges[-1] + (part.nbytes if w != self._rank else 0)))
        slot = self._slot(EXCHANGE, edges)
        for w, part in enumerate(parts):
            if w != self._rank and len(part):
                slot[edges[w] : edges[w] + part.nbytes].copy_(_bytes(part))
        self._send()
        for w, to in enumerate(found.split(list(into))):
            if w == self._rank:
                to.copy_(parts[w])
                continue
            came = self._came(w, EXCHANGE, self._rank, to.nbytes)
            if len(to):
                _bytes(to).copy_(came)
        return found

    def sum_(self, x: Tensor) -> None:
        """x becomes the sum of all workers' x, added up by rank: the same bits everywhere."""
        own = x.contiguous()
        self._slot(SUM, [0, _aligned(own.nbytes)])[: own.nbytes].copy_(_bytes(own))
        self._send()
        total = torch.zeros_like(own)
        for w in range(len(self._boxes)):
            came = own if w == self._rank else self._came(w, SUM, 0, own.nbytes).view(own.dtype).view(own.shape)
            total += came
        x.copy_(total)

    def close(self) -> None:
        for box in self._boxes:
            box.close()
        self._boxes = []

    @property
    def _turn(self) -> int:
        return self._message % 2

    def _slot(self, kind: int, edges: Sequence[int]) -> Tensor:
        """Where the next message is to be written, bytes; edges: of its parts, in bytes."""
        self._message += 1
        return self._boxes[self._rank].slot(self._turn, kind, edges)

    def _send(self) -> None:
        _publish(self._boxes[self._rank].address, self._message)

    def _came(self, worker: int, kind: int, part: int, nbytes: int) -> Tensor:
        """A part of the present message of another worker; valid until this worker sends the next but one."""
        box = self._boxes[worker]
        if not _arrived(box.address, self._message, LOOKS):
            self._wait(worker)
        return box.part(self._turn, kind, part, nbytes)

    def _wait(self, worker: int) -> None:
        box, start = self._boxes[worker], time.monotonic()
        looked = start
        while not _arrived(box.address, self._message, LOOKS // 10):
            now = time.monotonic()
            if now - start < YIELDING_S:
                os.sched_yield()
                continue
            time.sleep(NAP_S)
            if now - looked < ALIVE_EVERY_S:
                continue
            looked = now
            if box.ended() and not _arrived(box.address, self._message, 1):
                raise WorkerLostError(f"worker {worker} has ended")
            if now - start > self._patience_s:
                raise WorkerLostError(f"worker {worker} did not come to a message within {self._patience_s:g} s")


class _Box:
    """What one worker sends: a control block and two slots, each a file in memory; its own, or another one's."""

    def __init__(self, files: Sequence[int], place: Any, process: int | None) -> None:
        self.place, self._process = place, process
        self._control, *self._slots = [_File(file) for file in files]
        self._words = self._control.bytes(self._control.size()).numpy().view(np.int64)
        self.address = self._words.__array_interface__["data"][0]

    @classmethod
    def made(cls, world: int) -> _Box:
        files = [os.memfd_create("cdr_dist", os.MFD_CLOEXEC) for _ in range(3)]
        os.ftruncate(files[0], 8 * (_SLOTS + 2 * (world + 2)))
        box = cls(files, (os.getpid(), files, secrets.randbits(62)), None)
        box._words[_TOKEN] = box.place[2]
        return box

    @classmethod
    def found(cls, place: Any) -> _Box:
        """Another worker's. OSError where it is not to be reached."""
        process, numbers, token = place
        with ExitStack() as opened:
            files = []
            for number in numbers:
                files.append(os.open(f"/proc/{process}/fd/{number}", os.O_RDWR))
                opened.callback(os.close, files[-1])
            box = cls(files, place, os.pidfd_open(process))
            opened.pop_all()
        if len(box._words) <= _TOKEN or box._words[_TOKEN] != token:  # a process of this number elsewhere
            box.close()
            raise OSError("another process's memory")
        return box

    def slot(self, number: int, kind: int, edges: Sequence[int]) -> Tensor:
        words = self._of(number)
        words[0] = kind
        words[1 : 1 + len(edges)] = edges
        return self._slots[number].grown(edges[-1])

    def part(self, number: int, kind: int, part: int, nbytes: int) -> Tensor:
        words = self._of(number)
        start, room = int(words[1 + part]), int(words[2 + part] - words[1 + part])
        if words[0] != kind or room != _aligned(nbytes):
            raise RuntimeError(f"workers send different messages: kind {words[0]}, {room} bytes; {kind}, {nbytes} here")
        return self._slots[number].bytes(start + nbytes)[start:]

    def ended(self) -> bool:
        assert self._process is not None
        poll = select.poll()  # select.select takes no descriptor above 1023
        poll.register(self._process, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        self._words = np.empty(0, dtype=np.int64)
        for file in (self._control, *self._slots):
            file.close()
        if self._process is not None:
            os.close(self._process)

    def _of(self, number: int) -> Any:
        size = (len(self._words) - _SLOTS) // 2
        return self._words[_SLOTS + number * size :][:size]


class _File:
    """A file in memory, mapped as far as it has been asked for."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._mapped = torch.empty(0, dtype=torch.uint8)

    def size(self) -> int:
        return os.fstat(self._file).st_size

    def grown(self, nbytes: int) -> Tensor:
        """Its first bytes, of which there are then enough."""
        if nbytes > len(self._mapped):
            os.ftruncate(self._file, max(nbytes, 2 * len(self._mapped)))
        return self.bytes(nbytes)

    def bytes(self, nbytes: int) -> Tensor:
        """Its first bytes."""
        if nbytes > len(self._mapped):  # the map before goes when nothing reads it any more
            self._mapped = torch.frombuffer(mmap.mmap(self._file, self.size()), dtype=torch.uint8)
        return self._mapped[:nbytes]

    def close(self) -> None:
        self._mapped = torch.empty(0, dtype=torch.uint8)  # else the map, and with it the memory, would stay
        os.close(self._file)


def _bytes(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNED) * ALIGNED


def _load_acquire(_typing: Any, address: Any) -> Any:
    """The int64 at an address; what its writer stored before it is seen after it."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_pointer(builder, arguments[0]), "acquire", 8, typ=_INT64)

    return types.int64(address), generate


def _store_release(_typing: Any, address: Any, value: Any) -> Any:
    """Writes an int64 to an address, after all that was stored before."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[1], _pointer(builder, arguments[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(address, value), generate


_INT64 = ir.IntType(64)
load_acquire: Any = intrinsic(_load_acquire)
store_release: Any = intrinsic(_store_release)


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _INT64.as_pointer())


@compiled()
def _publish(address: int, message: int) -> None:
    store_release(address + 8 * _SENT, message)


@compiled()
def _arrived(address: int, message: int, looks: int) -> bool:
    for _ in range(looks):  # noqa: SIM110 (numba compiles no generators)
        if load_acquire(address + 8 * _SENT) >= message:
            return True
    return False
