"""jobs/explain.py: each source behaviour once, its parts as the reference finds them, on any number of workers."""

from __future__ import annotations

import contextlib

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cdr_dist.bilevel.options import PerceptronOptions
from cdr_dist.bilevel.perceptron import BehaviouralPerceptron
from cdr_dist.bilevel.relative_weights import LogMeanMass, relative_weights
from cdr_dist.configuration import from_words, to_yaml
from cdr_dist.data.stored_rows import StoredRows
from cdr_dist.evaluation.explanation import Behaviour, Explanation, as_html, as_text
from cdr_dist.jobs import run_job
from cdr_dist.training import explain, weights_file
from cdr_dist.training.best import best_of_run
from cdr_dist.training.explanation_job import explain_user, explanation_job, explanation_worker, file_name
from cdr_dist.training.run_folder import RunFolder
from tests import reference
from tests.browser import check_readable, needs_browser
from tests.datasets import rated, rows_of
from tests.problem import replaced
from tests.processes import on_workers
from tests.runs import tensors, train, words

MORE = ["recipe=biao", "upper.interval=3", "upper.optimiser=adam", "upper.lr=0.05"]
"""A perceptron that has something to say after few steps."""
STEPS = 40
ROWS = 20
"""Of a lane and step: eight steps, of which the last are short."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One validation, at the end: the best checkpoint is the newest."""
    folder = tmp_path_factory.mktemp("explain") / "run"
    train(words(rated(), folder, *MORE, f"trainer.max_steps={STEPS}", f"evaluation.every={STEPS}"))
    return folder


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    """The Parquet file that one worker writes, and what it counts."""
    out = tmp_path_factory.mktemp("weights") / "weights.parquet"
    counts = written_by(1, run, out)
    return pl.read_parquet(out), counts


def written_by(workers, run, out, most=0):
    return on_workers(workers, _worker, str(run), str(out), most)[0]


def _worker(rank, run, out, most):
    config = RunFolder(run).config()
    given = {"config": to_yaml(config), "folder": config.data, "run": run, "step": STEPS, "out": out, "most": most}
    with replaced(explain, "ROWS", ROWS):
        return explanation_worker(given)


@pytest.fixture
def job(monkeypatch, capsys):
    def start(*given):
        monkeypatch.setattr("sys.argv", ["explain.py", *map(str, given)])
        code = run_job("explain", None, explanation_job)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return start


def keys(name):
    return pl.read_parquet(rated() / "vocab" / f"{name}.parquet")


def last_rows():
    """The training row of each user with the largest timestamp."""
    rows = rows_of(rated(), "train").sort("user", "timestamp", "example_id")
    return rows.group_by("user", maintain_order=True).last().join(keys("user"), left_on="user", right_on="id")


def test_every_user_and_behaviour_is_written_once(written):
    parts = ["item", "category", "label", "timestamp"]
    of_users = last_rows().select("key", *(pl.col(f"source_candidates_{part}").alias(part) for part in parts))
    wanted = of_users.explode(parts).rename({"key": "user"})
    for name in ("item", "category"):
        wanted = wanted.with_columns(pl.col(name).replace_strict(*keys(f"source_{name}").select("id", "key")))
    order = ["user", "item", "timestamp"]
    found = written[0].select(wanted.columns).sort(order)
    assert found.height == 3000
    assert found.equals(wanted.sort(order))


def test_parts_multiply_to_the_score_and_weights_have_the_mean_gamma(written):
    frame, counts = written
    assert (frame["gamma_1"] * frame["gamma_2"] == frame["score"]).all()
    assert frame["weight"].mean() == pytest.approx(counts["gamma"], rel=1e-9)
    assert frame["weight"].std() > 0.01
    assert counts["relative_to_behaviours"] == frame.height
    again = (frame["score"].cast(pl.Float64) - frame["weight"].log()).to_numpy()
    assert again == pytest.approx(again[0], abs=1e-9)


def test_parts_are_those_of_the_reference_beside_the_last_training_row(run, written):
    """From the checkpoint's tensors and the shards' rows, in float64."""
    values = {name: tensor.double() for name, tensor in tensors(run).items()}
    tables = {n[7:-8]: t for n, t in values.items() if n.startswith("tables.") and n.endswith(".weights")}
    phi = {n[25:]: t for n, t in values.items() if n.startswith("dense.modules.perceptron.")}
    for name in [name for name in phi if ".key." in name]:  # the source half of a key has no effect
        phi[name] = torch.cat([phi[name], torch.zeros_like(phi[name])], dim=1)
    checked = 0
    for row in last_rows().sort("key").head(40)[::4].to_dicts():
        n = len(row["source_candidates_item"])
        batch = {f"source_{p}": torch.tensor(row[f"source_candidates_{p}"]) for p in ("item", "category")}
        for domain in ("source", "target"):
            for p in ("item", "category"):
                batch[f"{domain}_history_{p}"] = [row[f"{domain}_history_{p}"][-6:]] * n
        scores = reference.perceptron_scores(tables, phi, batch, heads=4)
        named = [keys("source_item")["key"][i - 2] for i in row["source_candidates_item"]]
        wanted = dict(zip(zip(named, row["source_candidates_timestamp"], strict=True), scores.tolist(), strict=True))
        own = written[0].filter(pl.col("user") == row["key"])
        for item, timestamp, score in own.select("item", "timestamp", "score").iter_rows():
            assert score == pytest.approx(wanted[item, timestamp], rel=1e-4, abs=1e-6)
            checked += 1
    assert checked == 100
    assert written[0]["gamma_2"].std() > 1e-3, "the local part says nothing: the test would not see it"


@pytest.mark.parametrize(("workers", "most"), [(2, 0), (3, 0), (2, 200)])
def test_more_workers_write_the_file_of_one(run, written, workers, most, tmp_path):
    """Every bit, in the same order; most: another scale, and so a file of its own to compare with."""
    frame, counts = written
    if most:
        counts = written_by(1, run, tmp_path / "one.parquet", most)
        frame = pl.read_parquet(tmp_path / "one.parquet")
        assert 0 < counts["relative_to_behaviours"] < 1000
        assert frame["score"].equals(written[0]["score"])
        assert frame["weight"].mean() == pytest.approx(counts["gamma"], rel=0.2)
    assert written_by(workers, run, tmp_path / "more.parquet", most) == counts
    assert pl.read_parquet(tmp_path / "more.parquet").equals(frame)


@pytest.mark.parametrize("normalisation", ["softmax", "softplus", "sigmoid"])
def test_a_relative_weight_is_the_weight_times_b_in_a_batch_of_all(normalisation):
    perceptron = BehaviouralPerceptron(2, PerceptronOptions(normalisation=normalisation)).double()
    torch.nn.init.constant_(perceptron.gamma_raw, 0.3)
    score = 3 * torch.randn(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean = LogMeanMass(normalisation)
    for some in (score[:200], score[:0], score[200:]):
        mean.add(some)
    with torch.no_grad():
        wanted = perceptron.weights(score, torch.ones(500, dtype=torch.bool), 500) * 500
    assert torch.allclose(relative_weights(perceptron, score, mean.value), wanted, rtol=1e-12)
    far = torch.tensor([-2000.0, -1000.0])
    assert torch.isfinite(relative_weights(perceptron, far, mean.value)).all()


def test_a_user_is_shown_with_the_weights_of_the_file(run, written, job, tmp_path):
    user, page = "u000205", tmp_path / "page.html"
    code, out, error = job(f"run={run}", f"user={user}", f"html={page}")
    assert (code, error) == (0, "")
    own = written[0].filter(pl.col("user") == user).sort("weight", descending=True)
    lines = [line.split("|") for line in out.splitlines() if line.startswith("| s0")][: own.height]
    assert [line[1].strip() for line in lines] == own["item"].to_list()
    assert [float(line[8]) for line in lines] == pytest.approx(own["weight"].to_list(), abs=6e-4)
    assert "3,000 behaviours (all of the dataset)" in out
    text = page.read_text()
    assert all(item in text for item in own["item"])
    code, out, _ = job(f"run={run}", f"user={user}", "most=100")
    assert code == 0
    assert "(a sample: 100 of 1,200 training rows)" in out
    assert (run / "explanations" / f"{user}.html").exists()


def test_histories_are_those_of_the_last_training_row(run):
    place = RunFolder(str(run))
    found = explain_user(place.config(), place, STEPS, "u000004", 1200)
    (row,) = last_rows().filter(pl.col("key") == "u000004").to_dicts()
    for domain in ("source", "target"):
        named = [keys(f"{domain}_item")["key"][i - 2] for i in row[f"{domain}_history_item"]][-6:]
        assert [item for item, _ in found.histories[domain]] == named
        assert named


def test_rows_with_fewer_candidates_or_no_histories_disturb_no_other(run):
    on_workers(1, _scored_with_fewer, str(run))


CANDIDATES = [10, 3, 0, 10, 1, 7, 2, 10, 5, 4, 10, 6]
"""Of 12 rows, which have 10; row 3 has no histories."""


def _scored_with_fewer(rank, run):
    place = RunFolder(run)
    config = place.config()
    rows = pq.read_table(rated() / "train" / "part-00000.parquet").slice(0, 12)
    fewer = rows
    for i, name in enumerate(rows.column_names):
        values = rows.column(name).to_pylist()
        if name.startswith("source_candidates_"):
            values = [of[:count] for of, count in zip(values, CANDIDATES, strict=True)]
        elif name.endswith(("_history_item", "_history_category")):
            values[3] = []
        fewer = fewer.set_column(i, rows.schema.field(i), pa.array(values, rows.schema.field(i).type))
    with best_of_run(config, config.data, place, STEPS) as session:
        score = explain.Scorer(session)
        found, whole = score(StoredRows.of(fewer)), score(StoredRows.of(rows))
        assert len(score(StoredRows.of(rows.slice(0, 0)))) == 0
    kept = torch.cat([torch.arange(10 * i, 10 * i + count) for i, count in enumerate(CANDIDATES)])
    for name in ("user", "item", "category", "timestamp", "label"):
        assert torch.equal(getattr(found, name), getattr(whole, name)[kept]), name
    assert torch.allclose(found.global_part, whole.global_part[kept], rtol=1e-5, atol=1e-7)
    same = (kept < 30) | (kept >= 40)
    assert torch.allclose(found.local_part[same], whole.local_part[kept][same], rtol=1e-5)
    assert not torch.allclose(found.local_part[~same], whole.local_part[kept][~same], rtol=1e-5)
    assert torch.equal(found.score, found.global_part * found.local_part)
    assert torch.isfinite(found.score).all()


def test_row_groups_are_bounded_and_a_failure_leaves_no_file(tmp_path):
    path = tmp_path / "weights.parquet"
    row = dict.fromkeys(weights_file.SCHEMA.names, 1) | dict.fromkeys(("user", "item", "category"), "a")
    table = pa.Table.from_pylist([row], schema=weights_file.SCHEMA)
    with replaced(weights_file, "ROW_GROUP_ROWS", 7):
        with weights_file.weights_file(str(path)) as write:
            for _ in range(4):
                write(pa.concat_tables([table] * 5))
        file = pq.ParquetFile(path).metadata
        assert [file.row_group(i).num_rows for i in range(file.num_row_groups)] == [7, 7, 6]
        assert file.row_group(0).column(0).compression == "ZSTD"
        with contextlib.suppress(KeyError), weights_file.weights_file(str(tmp_path / "half.parquet")) as write:
            write(table)
            raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["weights.parquet"]


def explanation(**more):
    behaviours = [Behaviour("<script>alert(1)</script>", "a&b", 1.0, 1_400_000_000, None, 0.5, 0.5, 1.2)]
    behaviours.append(Behaviour("low", "c", 0.0, 7, None, -0.5, -0.5, 0.4))
    histories = {"source": [("x", "a&b")], "target": [("<b>t</b>", "d")]}
    given = {"user": '<i>"u"', "run": "runs/<r>", "step": 3, "domains": {"source": "<s>", "target": "t"}}
    return Explanation(**given, behaviours=behaviours, histories=histories, typical=1.0, about="<about>", **more)


def test_names_are_escaped_and_the_page_needs_nothing_else():
    page = as_html(explanation())
    for raw in ("<script", "<i>", "<b>t", "<r>", "<s>", "<about>", "http", "src=", "@import", "url("):
        assert raw not in page, raw
    for escaped in ("&lt;script&gt;alert(1)&lt;/script&gt;", "&lt;i&gt;&#34;u&#34;", "&lt;b&gt;t&lt;/b&gt;", "a&amp;b"):
        assert escaped in page


@needs_browser
def test_a_browser_shows_it(tmp_path):
    (tmp_path / "page.html").write_text(as_html(explanation()))
    check_readable(tmp_path / "page.html", tmp_path)


def test_parts_that_are_left_out_are_called_so():
    page, text = as_html(explanation()), as_text(explanation())
    assert page.count("left out") == text.count("left out") == 2
    assert explanation().shared.keys() == {"a&b"}
    assert page.count('class="chip shared"') == text.count("a&b *") == 2
    assert [b.item for b in explanation().by_weight][1] == "low"
    assert "2014-05-13" in text
    assert file_name("../a b/c") == "..%2Fa b%2Fc.html"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["user=u000001"], "run= is missing"),
        (["run=RUN"], "give either user=KEY, for one user, or out=FILE.parquet, for all"),
        (["run=RUN", "user=a", "out=b"], "give either user=KEY"),
        (["run=RUN", "user=a", "workers=2"], "workers= goes with out= alone"),
        (["run=RUN", "out=a", "html=b"], "html= goes with user= alone"),
        (["run=RUN", "out=a", "most=0"], "most=0: must be a whole number, at least 1"),
        (["run=RUN", "out=a", "workers=9"], "workers=9: more than stream.lanes=8"),
        (["run=RUN", "usr=a"], "usr: unknown option; did you mean 'user'?"),
        (["run=RUN", "user=u00020"], "none of the 300 users of DATA, such as u000199, u000200, u000201"),
        (["run=RUN", "user=zz"], "none of the 300 users of DATA, such as u000297, u000298, u000299"),
        (["run=JOINT", "user=u000001"], "recipe=joint has no perceptron: nothing to explain"),
        (["run=NEW", "user=u000001"], "has no checkpoint yet"),
        (["run=none", "user=u000001"], "none: not a run (no config.yaml)"),
    ],
)
def test_a_mistake_is_one_line(given, message, run, job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, recipe in (("joint", "joint"), ("new", "biao")):
        config = from_words(words(rated(), tmp_path / name, f"recipe={recipe}"))
        RunFolder(config.run).open(config)
    stands = {"RUN": run, "JOINT": tmp_path / "joint", "NEW": tmp_path / "new"}
    code, out, error = job(*(f"run={stands.get(word[4:], word[4:])}" if "run=" in word else word for word in given))
    assert (code, out) == (2, "")
    assert message.replace("DATA", str(rated())) in error
    assert len(error.splitlines()) == 1
