"""Writes docs/configuration.md: every option of every job, from the code that defines it.

    python tools/configuration.py            # or: make docs
    python tools/configuration.py --check    # is the page what it would be?

With --check nothing is written; where the page is another, a line says where, and the exit code is 1.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdr_dist import help as train
from cdr_dist.data import prepare_options
from cdr_dist.data.generate_options import GenerateOptions
from cdr_dist.data.words import fields_of
from cdr_dist.errors import UserError
from cdr_dist.help import ROOT, Option
from cdr_dist.production.export_job import ExportOptions
from cdr_dist.production.forget_job import ForgetOptions
from cdr_dist.production.options import SETTLED, NightlyOptions
from cdr_dist.production.recommendation_options import RecommendOptions

PAGE = ROOT / "docs" / "configuration.md"
INTRODUCTION = """\
# Options

Every option of every job. `make docs` writes this page from the code that defines them (`tools/configuration.py`).

An option is a word `name=value` of the command line. Lists are written `[64,32]`, nothing is `null`, yes and no are
`true` and `false`. `--help` shows the options of one job. A row's address is `#JOB.OPTION`, as in
[#train.upper.interval](#train.upper.interval).
"""
WORDS: dict[str, type] = {
    "jobs/prepare.py": prepare_options.PrepareOptions,
    "jobs/recommend.py": RecommendOptions,
    "jobs/export.py": ExportOptions,
    "jobs/forget.py": ForgetOptions,
    "jobs/nightly.py": NightlyOptions,
    "tools/generate.py": GenerateOptions,
}
"""Jobs whose options are the fields of a dataclass. Those of jobs/train.py are in cdr_dist/help.py; any other job
describes its own in its docstring."""
FIRST = ("prepare", "train", "evaluate", "compare", "explain", "report", "recommend", "export", "nightly")
FILES = {"model": "train", "recipe": "train", "preset": "train", "experiment": "experiment", "scenario": "prepare"}
"""Options whose values are files of configs/, and the job that has them."""


def page() -> str:
    found = [INTRODUCTION, "".join(f"- [{path}](#{path.stem}): {_sentence(path)}\n" for path in jobs())]
    found.append("".join(f"- [{name}=](#files-{name}): the files of `configs/{name}/`\n" for name in FILES))
    found += [section for path in jobs() for section in _job(path)]
    for name, job in FILES.items():
        how = f"`{name}=NAME` of jobs/{job}.py takes `configs/{name}/NAME.yaml`."
        found.append(f"## files: {name}\n\n{how}\n\n{_chosen(name)}")
    return "\n".join(found)


def jobs() -> list[Path]:
    """In the order in which one meets them; new ones behind."""
    names = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))
    return [Path(f"jobs/{name}.py") for name in dict.fromkeys([*FIRST, *names])] + [Path("tools/generate.py")]


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""


def _sentence(path: Path) -> str:
    return _docstring(path).partition("\n\n")[0]


def _job(path: Path) -> Iterator[str]:
    head = f"## {path.stem}\n"
    if path.stem == "train":
        choices = [dataclasses.replace(o, meaning=f"One of [these files](#files-{o.name}).") for o in train.choices()]
        yield f"{head}\n{_sentence(path)}\n\n{_table('train', [*train.top(), *choices])}"
        for name, meaning, options in train.groups():
            yield f"### train: {name}\n\n{meaning}\n\n{_table('train', options)}"
    elif str(path) in WORDS:
        groups = _groups(WORDS[str(path)])
        yield f"{head}\n{_sentence(path)}\n\n{_table(path.stem, groups.pop(''))}"
        if path.stem == "prepare":
            more = "".join(f"- `{name}`: {meaning}\n" for name, meaning in prepare_options.STAND_FOR_MORE.items())
            yield f"Besides:\n\n{more}"
        for name, options in groups.items():
            yield f"### {path.stem}: {name}\n\n{_table(path.stem, options)}"
        if path.stem == "nightly":
            rows = "".join(f"| `{name}` | {by} |\n" for name, by in SETTLED.items())
            yield f"### nightly: what it sets itself\n\n| option of prepare or train | set to |\n| --- | --- |\n{rows}"
    else:
        yield f"{head}\n```text\n{_docstring(path)}\n```\n"


def _groups(cls: type) -> dict[str, list[Option]]:
    """Options of a dataclass, by the part of the name before the dot; first those without."""
    needed = _required(cls)
    found: dict[str, list[Option]] = {"": []}
    for name, (_, f) in fields_of(cls).items():
        if not name.startswith(prepare_options.OWN):
            default = "(required)" if name in needed else _typed(f.default)
            found.setdefault(name.rpartition(".")[0], []).append(Option(name, default, f.metadata["doc"]))
    return found


def _required(cls: type) -> list[str]:
    """The options that the class asks for where they are left out."""
    given: dict[str, str] = {}
    while True:
        try:
            cls(**given)
        except UserError as error:
            if missing := re.match(r"(\w+)= is missing", str(error)):
                given[missing[1]] = "given"
                continue
        return list(given)


def _typed(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(map(_typed, value)) + "]"
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _table(job: str, options: Iterable[Option]) -> str:
    rows = []
    for o in options:
        default = o.default if o.default in ("", "(required)") else f"`{o.default}`"
        rows.append(f'| <a id="{job}.{o.name}"></a>`{o.name}` | {default} | {_cell(o.meaning)} |\n')
    return "| option | default | meaning |\n| --- | --- | --- |\n" + "".join(rows)


def _chosen(group: str) -> str:
    """The files, and of a model its own options with their defaults, too, and other options that come with it."""
    rows = []
    for name, about in train.files(group).items():
        text = (ROOT / "configs" / group / f"{name}.yaml").read_text()
        given = yaml.safe_load(text) if group in ("model", "recipe") else {}
        whole = given if "@package _global_" in text else {group: given}
        own = [(f"{g}.{key}", value) for g, of in whole.items() if g != "recipe" for key, value in of.items()]
        shown = [f"`{key}={_typed(value) or 'null'}`" for key, value in own if not key.endswith("._target_")]
        rows.append(f"| `{name}` | {'; '.join([_cell(about), *shown])} |\n")
    return "| file | what it is |\n| --- | --- |\n" + "".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main(words: list[str]) -> int:
    text = page()
    if words != ["--check"]:
        PAGE.write_text(text)
        return 0
    there = PAGE.read_text() if PAGE.exists() else ""
    lines = itertools.zip_longest(there.splitlines(), text.splitlines())
    for number, (old, new) in enumerate(lines, 1):
        if old != new:
            print(f"docs/{PAGE.name}:{number}: has {old!r}, the code says {new!r}: make docs", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
