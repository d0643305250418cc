"""A plan that does not fit is refused before anything is allocated; what is said to be needed is what is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cdr_dist.configuration import from_words
from cdr_dist.data.dataset import read_manifest
from cdr_dist.embeddings.options import TableOptions, TableSpec
from cdr_dist.embeddings.tables import ShardedTables
from cdr_dist.errors import UserError
from cdr_dist.jobs import run_job
from cdr_dist.training import memory as module
from cdr_dist.training import worker
from cdr_dist.training.job import train_job
from cdr_dist.training.memory import GIB, PROCESS_BYTES, check_memory, check_memory_here, check_memory_of_cluster, need
from cdr_dist.training.session import Session
from tests.datasets import copied, edited, rated, sequenced
from tests.problem import replaced
from tests.processes import on_workers
from tests.runs import SEQUENTIAL, words


def of_rows(into, **rows):
    """A dataset whose manifest tells of tables of this size; nothing of it is there."""
    folder = copied(rated(), into)
    return edited(folder, rows=json.loads((folder / "manifest.json").read_text())["rows"] | rows)


@pytest.fixture
def large(tmp_path):
    """Two tables of 10^10 rows: 447 GiB each at width 12, 37 GiB of Adagrad's statistics."""
    return of_rows(tmp_path, target_item=10**10, source_item=10**10)


def said_by(given, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", *given])
    code = run_job("train", None, lambda w: train_job([x for x in w if x != "--check"], check="--check" in w))
    return code, capsys.readouterr()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("check", [True, False])
def test_a_plan_that_does_not_fit(workers, check, large, monkeypatch, capsys):
    """One line that names tables, need and budget; exit code 2, before Ray or anything else is started."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(large.parent)
    given = words(large, "run", "recipe=joint", f"trainer.workers={workers}")
    code, shown = said_by([*given, *(["--check"] if check else [])], monkeypatch, capsys)
    assert (code, shown.out) == (2, "")
    (line,) = shown.err.splitlines()
    each = 10**10 * 13 * 4 / GIB / max(workers, 1)
    needed = 4 * each + PROCESS_BYTES / GIB + 2 * 4 * 10**10 / GIB
    for part in (
        f"a worker needs {needed:.2f} GiB (tables {2 * each:.2f} GiB, checkpoint copy {2 * each:.2f} GiB, process ",
        f"{each:.2f} GiB, ",
        f"GiB free for each of {max(workers, 1)} worker(s) on this machine. Take more trainer.workers or ",
    ):
        assert part in line, line
    assert "largest target_item" in line or "largest source_item" in line
    assert not Path("run").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plan_that_fits_passes_and_the_budget_decides(workers, tmp_path):
    """A million items: 0.05 GiB of tables; refused where 0.81 GiB are allowed, but not without the copy."""
    dataset = of_rows(tmp_path, target_item=10**6)

    def checked(*more):
        config = from_words(words(dataset, "run", "recipe=joint", f"trainer.workers={workers}", *more))
        return check_memory(config, read_manifest(str(dataset)))

    each = 10**6 * 52 / max(workers, 1)
    assert checked().host == pytest.approx(PROCESS_BYTES + 2 * each + 4 * 10**6, rel=1e-3)
    limit = (PROCESS_BYTES + 1.5 * each + 4 * 10**6) / GIB
    with pytest.raises(UserError, match=r"allowed by trainer.memory_gb. Take .* or trainer.checkpoint=in_place"):
        checked(f"trainer.memory_gb={limit}")
    checked(f"trainer.memory_gb={limit}", "trainer.checkpoint=in_place")
    with pytest.raises(UserError, match=r"0.50 GiB allowed by trainer.memory_gb"):
        checked("trainer.memory_gb=0.5", "trainer.checkpoint=in_place")


@pytest.mark.parametrize("optimiser", ["rowwise_adagrad", "adagrad", "sgd"])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_estimate_is_what_tables_and_copies_take(optimiser, workers, tmp_path):
    given = words(rated(), tmp_path / "run", "recipe=joint", f"tables.optimiser={optimiser}")
    given = [*given, "tables.width=16", f"trainer.workers={workers}"]
    config = from_words(given)
    wanted = need(config, read_manifest(str(rated())))
    found = on_workers(workers, taken, given)
    assert found[0] == wanted.tables
    assert wanted.copy == sum(found[0].values())
    assert all(of[table] <= wanted.tables[table] for of in found for table in of)


@pytest.mark.parametrize(
    ("given", "domains"),
    [
        (["recipe=joint"], ["target", "source"]),
        (["recipe=target_only"], ["target"]),
        ([*SEQUENTIAL, "recipe=pretrain"], ["target", "source"]),
    ],
    ids=["joint", "target_only", "pretrain"],
)
def test_the_categories_of_every_item_that_batches_are_made_of_are_counted(given, domains, tmp_path):
    found = words(sequenced(), tmp_path / "run", *given)
    (held,) = on_workers(1, categories, found)
    assert list(held) == domains
    config = from_words(found)
    assert need(config, read_manifest(config.data)).categories == sum(held.values())


def categories(_rank, given):
    config = from_words(given)
    session = Session(config, config.data)
    session.close()
    return {domain: of.nbytes for domain, of in session.builder.category_of.items()}


def taken(rank, given):
    config = from_words(given)
    session = Session(config, config.data)
    session.close()
    states = session.tables.optimiser_shards()
    return {
        table: sum(part.numel() * part.element_size() for part in [rows, *states[table]])
        for table, (_, rows) in session.tables.shards().items()
    }


def test_one_worker_without_memory_stops_all_of_them(large, tmp_path):
    """Each looks at its own machine, before it allocates."""
    given = words(rated(), tmp_path / "run", "recipe=joint", "trainer.workers=2")
    assert all(limit > PROCESS_BYTES for limit in on_workers(2, looked, given))
    for answer in on_workers(2, looked, given, 1):
        assert answer.startswith("a worker needs 0.80 GiB")
        assert "free for each of 2 worker(s) on this machine" in answer
    for answer in on_workers(2, looked, words(large, tmp_path / "run", "recipe=joint", "trainer.workers=2")):
        assert "largest source_item" in answer or "largest target_item" in answer


def looked(rank, given, poor=None):
    config = from_words(given)
    free = (lambda: -GIB) if rank == poor else module.free_bytes
    try:
        with replaced(module, "free_bytes", free):
            return check_memory_here(config, read_manifest(config.data))
    except UserError as error:
        return str(error)


def test_a_worker_is_refused_before_anything_is_built(tmp_path):
    given = words(rated(), tmp_path / "run", "recipe=joint", "trainer.workers=2")
    for answer in on_workers(2, refused, given, 1):
        assert answer.startswith("a worker needs 0.80 GiB")
    assert [type(answer) for answer in on_workers(2, refused, given, None)] == [Built, Built]


class Built(Exception):  # noqa: N818 - that it is raised is what is looked at
    """Stands for the allocations of a session."""


def refused(rank, given, poor):
    """What ends a worker's function."""
    config = from_words(given)

    def built(*_):
        raise Built

    free = (lambda: -GIB) if rank == poor else module.free_bytes
    try:
        with replaced(module, "free_bytes", free), replaced(worker, "Session", built):
            worker.work(config, config.data, config.run)
    except UserError as error:
        return str(error)
    except Built as error:
        return error
    raise AssertionError("it went on")


def test_on_a_cluster_its_nodes_count_and_not_this_machine(large, monkeypatch, tmp_path):
    import ray

    given = words(rated(), tmp_path / "run", "recipe=joint", "trainer.workers=2")
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(module, "free_bytes", lambda: 0)

    def of_nodes(*gib):
        nodes = [{"Alive": True, "Resources": {"memory": g * GIB}} for g in gib]
        monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"memory": 99 * GIB}}])
        config = from_words(given)
        check_memory(config, read_manifest(str(rated())))
        check_memory_of_cluster(config, read_manifest(str(rated())))

    of_nodes(1, 1)
    with pytest.raises(UserError, match=r"0.75 GiB there for each of 2 workers on the cluster's 2 node\(s\)"):
        of_nodes(1, 0.5)
    config = from_words([*given[:-2], f"data={large}", "run=x", "trainer.memory_gb=4"])
    with pytest.raises(UserError, match=r"4.00 GiB allowed by trainer.memory_gb"):
        check_memory(config, read_manifest(str(large)))


def test_a_containers_limit_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "CGROUP", tmp_path)
    whole = module.free_bytes()
    for name, text in {"max": "3000", "current": "2500", "stat": "anon 1\ninactive_file 400\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert module.free_bytes() == 900
    (tmp_path / "memory.max").write_text("max\n")
    assert abs(module.free_bytes() - whole) < 2 * GIB


def test_the_planner_gets_the_budget():
    """Nothing is allocated: the table would be 2.4 GiB."""
    (said,) = on_workers(1, planned, 2 * GIB)
    assert said.startswith("the tables do not fit on 1 workers: ")


def planned(rank, memory):
    try:
        ShardedTables([TableSpec("a", 10**7, 64, 0.1)], TableOptions(width=64), 1, torch.device("cpu"), memory)
    except UserError as error:
        return str(error)
    return "planned"
