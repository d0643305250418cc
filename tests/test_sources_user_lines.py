"""format=coldrec and format=windows, and tables whose rows name their domain: the examples of their plain rows."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from cdr_dist.data.dataset import Manifest
from cdr_dist.data.prepare import PrepareOptions, check, options_from_words, prepare
from cdr_dist.errors import UserError
from tests.prepare_oracle import Row, expected_examples, expected_sequences
from tests.test_prepare import keys_of, rows_of, written_examples, written_sequences

SHARED = Path(os.environ.get("CDR_SHARED", Path(__file__).parents[1] / ".." / "shared"))
KUAIRAND = SHARED / "data" / "kuairand1k"
SHARES = "labels=sampled valid_share=.3 test_share=.3 sequences=4"


def coldrec_line(rng: np.random.Generator) -> tuple[list[str], list[str], str]:
    """Source and target items, and the line that says them."""
    source = ["5", *rng.integers(0, 9, rng.integers(0, 8)).astype(str)]
    target = list(rng.integers(0, 7, rng.integers(1, 4)).astype(str))
    return source, target, ",".join(["0"] * (9 - len(source)) + source) + ",," + ",".join(target)


def windows_line(rng: np.random.Generator) -> tuple[list[tuple[str, str]], str]:
    """(item, domain) in order, and the line that says them."""
    n = rng.integers(6, 20)
    items, domains = rng.integers(-1, 12, n).astype(str), rng.integers(3, 6, n).astype(str)
    return list(zip(items, domains, strict=True)), f"7\t{','.join(items)}\t{','.join(domains)}"


def prepared(words: str) -> tuple[PrepareOptions, Manifest]:
    options = options_from_words(words.split())
    return options, prepare(options)


def assert_equal(options: PrepareOptions, manifest: Manifest, source: list[Row], target: list[Row]) -> None:
    expected = expected_examples(source, target, options)
    for example in expected.values():
        del example["positives"]
    assert written_examples(options.out) == expected
    assert written_sequences(options.out, manifest) == expected_sequences(source, target, options)
    liked = [item for user, item, *_ in source if user in {user for user, _ in expected}]
    assert manifest.unknown["source_history"] == pytest.approx(liked.count(options.unknown) / len(liked))
    assert manifest.counts["unknown_targets"] == sum(row[1] == options.unknown for row in target)


@pytest.mark.parametrize("split", ["instance", "user", "leave_last"])
def test_coldrec_gives_the_examples_of_its_rows(tmp_path: Path, split: str) -> None:
    rng, source, target = np.random.default_rng(3), [], []
    for name, pack in (("a.csv", bytes), ("b.csv.gz", gzip.compress)):
        lines = []
        for number in range(1, 30):
            before, after, line = coldrec_line(rng)
            lines.append(line)
            user = f"{name}:{number}"
            source += [(user, item, time, 1.0) for time, item in enumerate(before)]
            target += [(user, item, len(before) + time, 1.0) for time, item in enumerate(after)]
        (tmp_path / name).write_bytes(pack("\n".join(lines).encode()))
    options, manifest = prepared(f"format=coldrec source={tmp_path}/*.csv* out={tmp_path}/out split={split} {SHARES}")
    assert_equal(options, manifest, source, target)
    assert manifest.unknown["source_history"] > 0.05
    assert (manifest.source_domain, manifest.target_domain) == ("*.csv*-source", "*.csv*-target")


def test_windows_give_the_examples_of_their_rows_wherever_the_domains_lie(tmp_path: Path) -> None:
    rng, rows, lines = np.random.default_rng(4), [], []
    for number in range(1, 60):
        behaviours, line = windows_line(rng)
        lines.append(line)
        rows += [(f"w.tsv:{number}", item, t, domain) for t, (item, domain) in enumerate(behaviours)]
    (tmp_path / "w.tsv").write_text("\n".join(lines))
    words = f"format=windows target={tmp_path} source_domain=5 target_domain=3 split=user least_history=2"
    options, manifest = prepared(f"{words} out={tmp_path}/out {SHARES}")
    source, target = ([(*row[:3], 1.0) for row in rows if row[3] == domain] for domain in "53")
    assert_equal(options, manifest, source, target)
    assert manifest.counts["short_targets"]
    assert (manifest.source_domain, manifest.target_domain) == ("5", "3")

    _, several = prepared(f"{words.replace('=5', '=5,4')} out={tmp_path}/two {SHARES}")
    keys = set(keys_of(f"{tmp_path}/two", "source_item").values())
    assert {key[:2] for key in keys - {"<padding>", "<unknown>"}} == {"5:", "4:"}
    assert not any(key.endswith("-1") for key in keys)
    assert several.sources == ["5", "4"]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_may_name_the_domain_of_each_row(tmp_path: Path, ending: str) -> None:
    rng, n = np.random.default_rng(5), 400
    log = pl.DataFrame(
        {
            "user_id": rng.integers(0, 25, n),
            "item_id": rng.integers(0, 30, n),
            "timestamp": rng.integers(0, 50, n),  # many at the same time in both domains
            "tab": rng.integers(1, 4, n),
        }
    )
    uri = f"{tmp_path}/log.{ending}"
    log.write_csv(uri) if ending == "csv" else log.write_parquet(uri)
    words = "columns.domain=tab source_domain=2 target_domain=1 unknown_item=7 least_history=3"
    options, manifest = prepared(f"source={uri} target={uri} {words} out={tmp_path}/out {SHARES}")
    assert options == options_from_words(f"source={uri} {words} out={tmp_path}/out {SHARES}".split())
    rows = [(str(user), str(item), time, 1.0, tab) for user, item, time, tab in log.iter_rows()]
    source, target = ([row[:4] for row in rows if row[4] == tab] for tab in (2, 1))
    both = {row[0] for row in source} & {row[0] for row in target}
    assert_equal(options, manifest, source, [row for row in target if row[0] in both])


def test_a_mistake_in_another_domains_row_is_passed_over_and_lines_are_counted_right(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    rows = ["user_id,item_id,timestamp,tab", "u,,x,other", *(f"u,i,{n},{tab}" for tab in "ts" for n in (1, 2, 3))]
    log.write_text("\n".join(rows))
    words = f"source={log} columns.domain=tab source_domain=s target_domain=t labels=sampled out={tmp_path}/out"
    with pytest.raises(UserError, match="the catalogue has 1 target items"):
        prepared(words)
    log.write_text("\n".join([*rows, "u,i,never,other", "u,i,never,s"]))
    with pytest.raises(UserError, match=r"log\.csv: line 10: timestamp 'never' is not a whole number"):
        prepared(words)


def test_a_domain_that_no_row_has_is_named_with_those_there_are(tmp_path: Path) -> None:
    lines = [f"1\t1,2,3,4\t9,4,{'4' if n else '8'},9" for n in range(3)]
    (tmp_path / "w.tsv").write_text("\n".join(lines))
    words = f"format=windows source={tmp_path}/w.tsv labels=sampled out={tmp_path}/out"
    for role, other in (("source", "target"), ("target", "source")):
        found = r"9 \(6 rows\), 4 \(5 rows\), 8 \(1 rows\)"
        message = rf"w\.tsv: no row's domain is '5' \({role}_domain=\); found most often: {found}"
        with pytest.raises(UserError, match=message):
            prepared(f"{words} {role}_domain=5 {other}_domain=4")


BAD = {
    "coldrec": {
        "0,1,2,3": r"no ',,' between source and target items; a line reads s1,\.\.\.,sn,,t1,t2,\.\.\.",
        "0,1,2,,": "no target item",
        "0,0,0,,4": "the source sequence is all padding",
        ",,4": "the source sequence is empty",
        "0,1.5,,4": r"'1\.5' is not a whole number",
        "0,1,,4,-2": "'-2' is not a whole number",
        "0,1,,4,,5": "'' is not a whole number",
        "0,1, 2,,4": "' 2' is not a whole number",
    },
    "windows": {
        "1\t5,6": "2 fields between tabs, not 3; a line reads partition TAB item,",
        "1\t5,6\t9": "2 items, but 1 domains",
        "1\t5,,6\t9,9,9": "item 2 is empty",
        "1\t5,6\t9,": "domain 2 is empty",
    },
}


@pytest.mark.parametrize(("form", "line"), [(form, line) for form, bad in BAD.items() for line in bad])
def test_a_malformed_line_is_named(tmp_path: Path, form: str, line: str) -> None:
    log = tmp_path / "log.txt"
    good = {"coldrec": "0,1,2,,3", "windows": "1\t5,6,7\t9,4,9"}[form]
    words = f"format={form} source={log} source_domain=9 target_domain=4 labels=sampled out={tmp_path}/out"
    log.write_text(f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(UserError, match=rf"log\.txt: line 3: {BAD[form][line]}"):
        prepared(words)
    log.write_text(line)  # and where it is the first, it is found before anything is written
    with pytest.raises(UserError, match=rf"log\.txt: line 1: {BAD[form][line]}"):
        check(options_from_words(words.split()))
    log.write_text("")
    with pytest.raises(UserError, match=r"log\.txt: is empty; a line reads "):
        check(options_from_words(words.split()))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("format=coldrec", "format=coldrec: has no ratings; give labels=sampled"),
        (
            "format=windows labels=sampled",
            "format=windows: needs source_domain=, the domain whose rows are the source's",
        ),
        ("columns.domain=tab source_domain=a", "columns.domain=: needs target_domain=, the domain whose rows are the"),
        (
            "format=coldrec labels=sampled source_items=a.csv",
            "format=coldrec: has no item or user files; leave out source_items=",
        ),
        ("sequences=1", "sequences=1: a sequence has 2 behaviours or more; 0: none are written"),
        ("sequences=5 cold_users=false", "sequences= goes with cold_users=true, by whose rows users are found"),
        (
            "split=user valid_share=.6 test_share=.4",
            "valid_share=0.6, test_share=0.4: must be 0 or more, and less than 1",
        ),
        ("sequences_test_share=-.1", "sequences_valid_share=0.05, sequences_test_share=-0.1: must be 0 or more"),
        ("least_history=-1", "least_history=-1: must be 0 or more"),
        ("split=user valid_from=3", "valid_from= and test_from= need split=time"),
        ("split=users", "split=users: did you mean 'user'?"),
    ],
)
def test_options_that_contradict_one_another(words: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        options_from_words([*words.split(), "source=a.tsv", "target=b.tsv", "out=x"])
    assert str(raised.value).startswith(message)


def test_files_of_one_name_would_mix_their_users_up(tmp_path: Path) -> None:
    for day in ("2026-11-01", "2026-11-02"):
        (tmp_path / day).mkdir()
        (tmp_path / day / "log.csv").write_text("0,1,2,,3\n")
    words = f"format=coldrec source={tmp_path}/{{date}} days=2026-11-01..2026-11-02 labels=sampled out={tmp_path}/out"
    with pytest.raises(UserError, match=r"two files are named log\.csv, and users are named by file and line"):
        check(options_from_words(words.split()))


@pytest.mark.skipif(not KUAIRAND.is_dir(), reason=f"the real logs are not at {KUAIRAND} (CDR_SHARED)")
def test_a_quarter_of_kuairands_items_is_unknown(tmp_path: Path) -> None:
    with gzip.open(KUAIRAND / "testing.tsv.gz", "rt") as file:
        lines = [next(file) for _ in range(20)]
    (tmp_path / "few.tsv").write_text("".join(lines))
    words = f"format=windows source={tmp_path}/few.tsv source_domain=9 target_domain=4 split=user labels=sampled"
    options, manifest = prepared(f"{words} sequences=50 out={tmp_path}/out")
    tabs = [pair for line in lines for pair in zip(*(f.split(",") for f in line.split("\t")[1:]), strict=True)]
    source = [item for item, tab in tabs if tab.strip() == "9"]
    assert manifest.counts["source_behaviours"] == len(source)
    assert manifest.unknown["source_history"] == source.count("-1") / len(source) == pytest.approx(0.23, abs=0.05)
    assert sum(1 in row["source_history_item"] for row in rows_of(options.out, "train"))
