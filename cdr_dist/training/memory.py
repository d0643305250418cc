"""What a run needs of memory and what there is, a worker: found before anything is allocated."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from cdr_dist.configuration import TrainConfig
from cdr_dist.data.dataset import Manifest
from cdr_dist.embeddings.options import TableSpec
from cdr_dist.embeddings.workers import world_size
from cdr_dist.errors import UserError
from cdr_dist.training.checks import build_model, table_specs

GIB = 2**30
PROCESS_BYTES = int(0.8 * GIB)
"""A worker without tables after a few steps of BIAO at batch 1024, histories of 20: 0.6 GiB measured in this process
(RSS, two cores, CPU build), 0.8 GB on a Ray Train worker."""
CGROUP = Path("/sys/fs/cgroup")
SHOWN_TABLES = 3


@dataclass(frozen=True)
class Need:
    """Bytes that the worker with the most rows needs. device: where the tables are (cpu or cuda)."""

    device: str
    tables: dict[str, int]
    """Of each table: its rows and the statistics of its fused optimiser."""
    copy: int
    """For checkpoints in the background, in host memory."""
    categories: int
    """The category of every item, in host memory."""

    @property
    def of_tables(self) -> int:
        return sum(self.tables.values())

    @property
    def host(self) -> int:
        return PROCESS_BYTES + self.categories + self.copy + (self.of_tables if self.device == "cpu" else 0)

    def __str__(self) -> str:
        parts = [f"tables {_gib(self.of_tables)}" + (" on the device" if self.device != "cpu" else "")]
        parts += [f"checkpoint copy {_gib(self.copy)}"] if self.copy else []
        return f"{_gib(self.host)} ({', '.join(parts)}, process {_gib(PROCESS_BYTES + self.categories)})"

    @property
    def largest(self) -> str:
        """The largest tables with their bytes."""
        ordered = sorted(self.tables.items(), key=lambda of: -of[1])[:SHOWN_TABLES]
        return ", ".join(f"{name} {_gib(of)}" for name, of in ordered)


def need(config: TrainConfig, manifest: Manifest) -> Need:
    """Of the worker that holds the most rows."""
    model = build_model(config)
    specs = table_specs(config, manifest, model)
    tables = {spec.name: _table_bytes(spec, config, max(config.trainer.workers, 1)) for spec in specs}
    copy = sum(tables.values()) if config.trainer.checkpoint == "background" else 0
    read = {*model.spec().features, *model.spec().sequences}
    domains = ("source", "target") if any(f.startswith("source_") for f in read) else ("target",)
    return Need(config.trainer.device, tables, copy, sum(4 * manifest.rows[f"{d}_item"] for d in domains))


def _table_bytes(spec: TableSpec, config: TrainConfig, workers: int) -> int:
    values = {"rowwise_adagrad": 1, "sgd": 0, "adagrad": spec.width, "adam": 2 * spec.width}
    return -(-spec.padded_rows // workers) * 4 * (spec.width + values[config.tables.optimiser])


def check_memory(config: TrainConfig, manifest: Manifest) -> Need:
    """What the driver can say before workers are there. UserError: one needs more than it may take, or than is free."""
    wanted, workers = need(config, manifest), max(config.trainer.workers, 1)
    if config.trainer.memory_gb or not _elsewhere(config):
        _compare(wanted, config, *_limit(config, workers, own=config.trainer.workers == 0))
    if config.trainer.device == "cuda" and config.trainer.workers == 0:
        _compare_device(wanted, config)
    return wanted


def check_memory_of_cluster(config: TrainConfig, manifest: Manifest) -> None:
    """The same of a cluster that this process is connected to: the memory of all its nodes, as Ray counts it."""
    import ray

    if config.trainer.memory_gb or not _elsewhere(config):
        return
    nodes = [node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]]
    what = f"there for each of {config.trainer.workers} workers on the cluster's {len(nodes)} node(s)"
    _compare(need(config, manifest), config, int(sum(nodes)) // config.trainer.workers, what)


def check_memory_here(config: TrainConfig, manifest: Manifest) -> int:
    """On a worker, before it allocates: bytes that it may take where its tables are. All workers call it.

    UserError, on all of them: one of them needs more than there is on its machine or device.
    """
    wanted, error, limit = need(config, manifest), "", 0
    try:
        limit, what = _limit(config, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), own=True)
        _compare(wanted, config, limit, what)
        if config.trainer.device == "cuda":
            limit = _compare_device(wanted, config)
    except UserError as mistake:  # the other workers wait for this one's word
        error = str(mistake)
    answers = [(error, limit)] * world_size()
    if world_size() > 1:
        dist.all_gather_object(answers, (error, limit))
    if error := next((e for e, _ in answers if e), ""):
        raise UserError(error)
    return min(found for _, found in answers)


def free_bytes() -> int:
    """Memory that this machine, or the container that this process runs in, has left."""
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # no cgroup v2, or no limit ("max")
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(stat.get("inactive_file", 0)))
    return max(free, 0)


def _elsewhere(config: TrainConfig) -> bool:
    """Whether workers run on other machines than this."""
    return config.trainer.workers > 0 and bool(os.environ.get("RAY_ADDRESS"))


def _limit(config: TrainConfig, workers: int, own: bool) -> tuple[int, str]:
    """Bytes of main memory for a worker, and in words. own: this process is one; what it has taken it need not get."""
    if config.trainer.memory_gb:
        return int(config.trainer.memory_gb * GIB), "allowed by trainer.memory_gb"
    taken = psutil.Process().memory_info().rss if own else 0
    return free_bytes() // workers + taken, f"free for each of {workers} worker(s) on this machine"


def _compare(wanted: Need, config: TrainConfig, limit: int, what: str) -> None:
    if wanted.host > limit:
        raise _too_much(wanted, config, str(wanted), limit, what)


def _compare_device(wanted: Need, config: TrainConfig) -> int:
    free, _ = torch.cuda.mem_get_info()
    if wanted.of_tables > free:
        raise _too_much(wanted, config, f"{_gib(wanted.of_tables)} for its tables", free, "free on its device")
    return free


def _too_much(wanted: Need, config: TrainConfig, needs: str, limit: int, what: str) -> UserError:
    ways = ["more trainer.workers", f"a smaller tables.width than {config.tables.width}"]
    ways += ["trainer.checkpoint=in_place"] if wanted.copy else []
    return UserError(
        f"a worker needs {needs}, largest {wanted.largest}; {_gib(limit)} {what}. Take {' or '.join(ways)}"
    )


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed for the next step: its pages, given back and fetched anew in every step, take
    a fifth of one at batch 16,384. Nothing happens with another allocator."""
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20)):
            mallopt(option, value)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
