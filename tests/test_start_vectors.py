"""Tables that start from given vectors: the rows that match and only they, on any number of workers, read once."""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdr_dist.configuration import from_words, from_yaml, to_yaml
from cdr_dist.errors import UserError
from cdr_dist.jobs import run_job
from cdr_dist.training import start_vectors as module
from cdr_dist.training.job import check_run, train_job
from cdr_dist.training.session import Session
from cdr_dist.training.start_vectors import start_from_vectors
from tests.datasets import rated
from tests.problem import replaced
from tests.processes import on_workers
from tests.runs import KILLED, lines, same_run, summary, tensors, train, words

WIDTH = 12


def users():
    """Keys of the vocabulary in another order than its own."""
    return pl.read_parquet(rated() / "vocab/user.parquet")["key"].sample(fraction=1.0, shuffle=True, seed=3).to_list()


def vectors_of(keys, width=WIDTH):
    return np.random.default_rng(len(keys)).normal(size=(len(keys), width)).astype(np.float32)


def written(path, keys, vectors, rows=40, kind=None):
    """A file of small row groups."""
    column = pa.array(list(vectors), type=kind or pa.list_(pa.float32()))
    pq.write_table(pa.table({"id": keys, "vector": column}), path, row_group_size=rows)
    return path


def given(path, run, *more):
    return words(rated(), run, "recipe=joint", f"tables.start.user={path}", *more)


def some(path):
    """200 of the 300 users, and 50 keys that nobody has."""
    keys = [*users()[:200], *(f"nobody-{i}" for i in range(50))]
    vectors = vectors_of(keys)
    return written(path, keys, vectors), dict(zip(keys, vectors, strict=True))


def started(rank, words_):
    config = from_words(words_)
    session = Session(config, config.data)
    try:
        return start_from_vectors(session), session.tables.unsharded("user")
    finally:
        session.close()


def untouched(rank, words_):
    config = from_words(words_)
    session = Session(config, config.data)
    session.close()
    return session.tables.unsharded("user")


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_rows_of_the_given_keys_start_from_their_vectors_and_others_as_usual(workers, tmp_path):
    path, expected = some(tmp_path / "users.parquet")
    (usual,) = on_workers(1, untouched, given(path, tmp_path / "run"))
    found = on_workers(workers, started, given(path, tmp_path / "run"))
    assert all(matched == {"user": 200} for matched, _ in found)
    table = found[0][1]
    vocabulary = pl.read_parquet(rated() / "vocab/user.parquet")
    for row, key in vocabulary.iter_rows():
        wanted = expected.get(key, usual[row].numpy())
        assert np.array_equal(table[row].numpy(), wanted), key
    assert np.array_equal(table[:2], usual[:2])


def test_a_worker_reads_vectors_only_where_keys_are_its_own(tmp_path, monkeypatch):
    """In the vocabulary's order a file's row groups belong to one worker each, and neither holds more than one."""
    keys = pl.read_parquet(rated() / "vocab/user.parquet")["key"].to_list()
    path = written(tmp_path / "users.parquet", keys, vectors_of(keys), rows=10)
    read = on_workers(2, groups_read, given(path, tmp_path / "run"))
    assert [sorted(of) for of in read] == [list(range(16)), list(range(15, 30))]


def groups_read(rank, words_):
    found = []
    original = pq.ParquetFile.read_row_group

    def reads(self, group, columns=None, **more):
        if columns == ["vector"]:
            found.append(group)
        return original(self, group, columns=columns, **more)

    with replaced(pq.ParquetFile, "read_row_group", reads):
        started(rank, words_)
    return found


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.list_(pa.float32(), WIDTH), pa.large_list(pa.float32())])
def test_every_kind_of_list(kind, tmp_path):
    keys = users()
    path = written(tmp_path / "users.parquet", keys, vectors_of(keys), kind=kind)
    ((matched, table),) = on_workers(1, started, given(path, tmp_path / "run"))
    assert matched == {"user": 300}
    assert np.array_equal(np.sort(table[2:].numpy(), axis=0), np.sort(vectors_of(keys), axis=0))


def test_a_run_says_how_many_and_a_resume_reads_nothing(tmp_path, monkeypatch):
    """The same bits as the uninterrupted run; the file is gone by then."""
    path, _ = some(tmp_path / "users.parquet")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ["trainer.max_steps=12", "trainer.checkpoint_every=4"]
    train(given(path, whole, *more))
    assert summary(whole)["started"] == {"user": 200}
    assert [line["values"] for line in lines(whole, "start")] == [{"user": 200}]
    assert train(given(path, killed, *more), killed_after=0) == [KILLED]  # before any checkpoint: it reads again
    assert train(given(path, killed, *more), killed_after=7) == [KILLED]
    path.unlink()
    train(given(path, killed, *more))
    same_run(whole, killed)
    assert summary(killed)["started"] == {"user": 200}
    assert len(lines(killed, "start")) == 1


def test_two_workers_train_from_them_as_one_does(tmp_path):
    path, _ = some(tmp_path / "users.parquet")
    for workers in (1, 2):
        train(given(path, tmp_path / str(workers), "trainer.max_steps=10"), workers)
    one, two = (tensors(tmp_path / str(workers)) for workers in (1, 2))
    assert (
        float((one["tables.user.weights"] - two["tables.user.weights"][: len(one["tables.user.weights"])]).norm())
        < 1e-4
    )
    train(words(rated(), tmp_path / "usual", "recipe=joint", "trainer.max_steps=10"))
    usual = tensors(tmp_path / "usual")
    assert float((one["tables.user.weights"] - usual["tables.user.weights"]).norm()) > 10


def nan(vectors):
    vectors[3, 5] = np.nan
    return vectors


BAD = {
    "no file": (lambda path, keys: None, "users.parquet: not found"),
    "not Parquet": (lambda path, keys: path.write_bytes(b"id,vector\n" * 9), "users.parquet: cannot be read ("),
    "no id": (lambda path, keys: pq.write_table(pa.table({"key": keys}), path), "users.parquet: has no column id"),
    "no vector": (lambda path, keys: pq.write_table(pa.table({"id": keys}), path), "has no column vector"),
    "text for vectors": (
        lambda path, keys: pq.write_table(pa.table({"id": keys, "vector": keys}), path),
        "column vector holds string, not lists",
    ),
    "another width": (
        lambda path, keys: written(path, keys, vectors_of(keys, 8)),
        "has 8 values, tables.width=12",
    ),
    "another width by type": (
        lambda path, keys: written(path, keys, vectors_of(keys, 8), kind=pa.list_(pa.float32(), 8)),
        "vectors of 8 values, tables.width=12",
    ),
    "a vector that is missing": (
        lambda path, keys: written(path, keys, [*vectors_of(keys[1:]), None]),
        "has 0 values, tables.width=12",
    ),
    "a value that is missing": (
        lambda path, keys: written(path, keys[:1], [[None] * WIDTH]),
        "holds a value that is not finite",
    ),
    "not a number": (lambda path, keys: written(path, keys, nan(vectors_of(keys))), "holds a value that is not finite"),
    "a value of a damaged file": (
        lambda path, keys: written(path, keys[:1], [[3e37] * WIDTH]),
        "holds a value beyond 1e+06",
    ),
    "a key twice": (lambda path, keys: written(path, keys + keys[-1:], vectors_of(keys + keys[-1:])), "occurs twice"),
    "a key twice in a row group": (
        lambda path, keys: written(path, keys[:1] * 2, vectors_of(keys[:2])),
        "occurs twice",
    ),
    "no key of ours": (
        lambda path, keys: written(path, ["x", "y"], vectors_of(["x", "y"])),
        "none of its keys is in the vocabulary user of",
    ),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("case", BAD)
def test_a_file_that_cannot_be_used(case, workers, tmp_path, monkeypatch, capsys):
    """One line, the same on every worker."""
    write, said = BAD[case]
    path = tmp_path / "users.parquet"
    write(path, users())
    if workers:
        for answer in on_workers(workers, refused, given(path, tmp_path / "run")):
            assert answer.startswith(str(path)), answer
            assert said in answer or said.startswith("users.parquet"), answer
        return
    monkeypatch.setattr("sys.argv", ["train.py", *given(path, tmp_path / "run")])
    assert run_job("train", None, train_job) == 2
    shown = capsys.readouterr().err.splitlines()
    assert said in shown[-1], shown
    assert not (tmp_path / "run").exists()


def refused(rank, words_):
    try:
        started(rank, words_)
    except UserError as error:
        return str(error)
    return "nothing was wrong"


def test_the_table_has_to_be_there_and_check_looks_at_the_file(tmp_path):
    path, _ = some(tmp_path / "users.parquet")
    assert check_run(from_words(given(path, tmp_path / "run"))).startswith("ok: ")
    with pytest.raises(UserError, match=r"tables.start.usr: no such table; did you mean 'user'\?"):
        check_run(from_words([*given(path, tmp_path / "run"), f"tables.start.usr={path}"]))
    path.unlink()
    with pytest.raises(UserError, match=r"users.parquet: not found"):
        check_run(from_words(given(path, tmp_path / "run")))
    with pytest.raises(UserError, match=r"tables.start.user= is empty"):
        from_words(["tables.start.user="])
    both = {"user": "item", "target_item": "item"}
    with pytest.raises(UserError, match=r"tables.start.item: its rows have several vocabularies \(user, target_item\)"):
        module._vocabulary("item", both)


def test_paths_are_taken_as_they_are():
    for path in ("/a=b/(c)/x,y.parquet", "2024", 's3://bucket/${x}/"q".parquet'):
        config = from_words([f"tables.start.user={path}", "tables.start.target_item=x"])
        assert config.tables.start == {"user": path, "target_item": "x"}
        assert "${" in path or from_yaml(to_yaml(config)).tables == config.tables
