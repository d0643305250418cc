"""docs/configuration.md says what the code says, of every job and option, and notices when the two part."""

from __future__ import annotations

import dataclasses
import importlib
import re

import pytest

from cdr_dist import help as train
from cdr_dist.data.words import fields_of
from cdr_dist.training import audit, evaluation_job, experiment_job, explanation_job, report_job
from tools import configuration

SAID = {
    "evaluate": evaluation_job.OPTIONS,
    "compare": ("a", "b", "out"),
    "explain": explanation_job.OPTIONS,
    "report": report_job.OPTIONS,
    "audit": ("source", "target", *audit.OWN),
    "experiment": experiment_job.OWN,
    "demo": ("out",),
}
"""Jobs that describe their options in their docstrings -> the options that they take."""
NIGHTLY = configuration.NightlyOptions


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The page as the code is now, whatever is committed."""
    monkeypatch.setattr(configuration, "PAGE", tmp_path / "configuration.md")
    assert configuration.main([]) == 0
    assert configuration.main(["--check"]) == 0


def test_the_committed_page_is_current(capsys):
    assert configuration.main(["--check"]) == 0, capsys.readouterr().err


def test_every_option_has_a_default_or_none_and_a_meaning():
    rows = re.findall(r'^\| <a id="(.*?)"></a>`(.*?)` \| (.*?) \| (.*) \|$', configuration.page(), re.M)
    assert len({address for address, *_ in rows}) == len(rows) > 150
    assert [address for address, _, _, meaning in rows if len(meaning) < 4] == []
    found = {address.partition(".")[0]: 0 for address, *_ in rows}
    assert set(found) == {"prepare", "train", "recommend", "export", "forget", "nightly", "generate"}
    required = [address for address, _, default, _ in rows if default == "(required)"]
    assert required == [
        *("prepare.source", "prepare.target", "prepare.out", "recommend.run", "recommend.out"),
        *("export.run", "export.out", "nightly.date", "nightly.out", "generate.out"),
    ]


@pytest.mark.parametrize("job", SAID)
def test_docstrings_name_every_option_of_the_jobs_that_have_no_dataclass(job):
    about = importlib.import_module(f"jobs.{job}").__doc__
    assert [name for name in SAID[job] if not re.search(rf"(?<!\w){name}(?!\w)", about)] == []


def test_every_job_is_described():
    assert {path.stem for path in configuration.jobs()} == {
        *SAID,
        "train",
        *(name.removeprefix("jobs/").removeprefix("tools/").removesuffix(".py") for name in configuration.WORDS),
    }


def test_every_file_that_can_be_chosen_says_what_it_is():
    silent = [(group, name) for group in configuration.FILES for name, about in train.files(group).items() if not about]
    assert silent == []


@pytest.mark.parametrize("name", ["gate.drop", "window"])
def test_another_meaning_of_a_words_option_is_noticed(name, monkeypatch, capsys, written):
    of = fields_of(NIGHTLY)
    changed = dataclasses.field(default=of[name][1].default, metadata={"doc": "something else"})
    monkeypatch.setattr(
        configuration, "fields_of", lambda cls: fields_of(cls) | ({name: (int, changed)} if cls is NIGHTLY else {})
    )
    assert configuration.main(["--check"]) == 1
    said = capsys.readouterr().err
    assert re.match(rf"docs/configuration.md:\d+: has .*`{name}`.*the code says .*something else", said)
    assert said.count("\n") == 1


@pytest.mark.parametrize("change", [{"meaning": "another"}, {"default": "another"}, {"name": "another"}])
def test_another_option_of_training_is_noticed(change, monkeypatch, capsys, written):
    first, *others = train.groups()
    options = [dataclasses.replace(first[2][0], **change), *first[2][1:]]
    monkeypatch.setattr(train, "groups", lambda: [(first[0], first[1], options), *others])
    assert configuration.main(["--check"]) == 1
    assert "another" in capsys.readouterr().err


def test_another_docstring_is_noticed(monkeypatch, capsys, written):
    own = configuration._docstring
    monkeypatch.setattr(configuration, "_docstring", lambda path: own(path).replace("full_ks", "at_ks"))
    assert configuration.main(["--check"]) == 1
    assert "at_ks" in capsys.readouterr().err
