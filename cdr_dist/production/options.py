"""The options of a night: its own, and those of prepare and train that it passes on; from YAML and from words."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from zoneinfo import ZoneInfo

import yaml

from cdr_dist.configuration import TrainConfig, from_words, of_prepare_and_train
from cdr_dist.data import storage
from cdr_dist.data.prepare_options import DATE, PrepareOptions, options_from_words
from cdr_dist.data.retries import refuse_secrets
from cdr_dist.data.words import check, fields_of, option, pairs, values_of
from cdr_dist.errors import UserError
from cdr_dist.production.drift import DriftOptions
from cdr_dist.production.gate import GateOptions
from cdr_dist.production.recommendation_options import ListOptions

SETTLED = {
    "extends": "yesterday's dataset",
    "forgotten": "that of yesterday's dataset",
    "days": "window",
    "split": "time",
    "valid_from": "the day before",
    "test_from": "the day",
    "until": "the day's end",
    "data": "the night's dataset",
    "run": "the night's run",
    "warm_start.run": "the published model",
}
"""Options of prepare and train that a night sets itself."""


@dataclass(frozen=True)
class NightlyOptions:
    """A night's own options; what is none of them goes to prepare or train."""

    date: str = option("", "the day that the logs end with, as 2026-11-24; its rows are the test rows")
    config: str = option("", "YAML file with any of these options and of prepare's and train's; words win")
    out: str = option("", "folder of datasets, runs and latest.json, local or a URI")
    window: int = option(30, "days of logs that a dataset holds, the last one included")
    keep: int = option(7, "published versions whose dataset and run stay")
    zone: str = option("UTC", "time zone in which days begin, as Europe/Berlin")
    gate: GateOptions = field(default_factory=GateOptions)
    drift: DriftOptions = field(default_factory=DriftOptions)
    recommendations: bool = option(True, "recommendations by the published model to the users of the night's dataset")
    recommend: ListOptions = field(default_factory=ListOptions)

    def __post_init__(self) -> None:
        for name in ("date", "out"):
            check(bool(getattr(self, name)), f"{name}= is missing")
        check(self.window >= 3, f"window={self.window}: must be 3 or more: to train, to validate and to test on")
        check(self.keep >= 1, f"keep={self.keep}: must be 1 or more")
        check(_is_day(self.date), f"date={self.date}: write a day, as 2026-11-24")
        try:
            zone = ZoneInfo(self.zone)
        except (ValueError, OSError, KeyError):
            raise UserError(f"zone={self.zone}: unknown time zone; write one as Europe/Berlin") from None
        today = datetime.datetime.now(zone).date()
        check(self.day <= today, f"date={self.date}: is in the future; today is {today} in {self.zone}")

    @property
    def day(self) -> datetime.date:
        return datetime.date.fromisoformat(self.date)

    def begins(self, days: int = 0) -> int:
        """The timestamp at which the day so many days after `date` begins."""
        day = self.day + datetime.timedelta(days)
        return int(datetime.datetime(day.year, day.month, day.day, tzinfo=ZoneInfo(self.zone)).timestamp())


@dataclass(frozen=True)
class Request:
    """own: the night's options. prepare, train: words for the two."""

    own: NightlyOptions
    prepare: list[str]
    train: list[str]

    def prepare_options(self, out: str, extends: str) -> PrepareOptions:
        o = self.own
        first = o.day - datetime.timedelta(o.window - 1)
        settled = [f"days={first}..{o.day}", "split=time", f"valid_from={o.begins(-1)}", f"test_from={o.begins()}"]
        settled += [f"until={o.begins(1)}", f"out={out}"] + ([f"extends={extends}"] if extends else [])
        return options_from_words([*self.prepare, *settled])

    def train_config(self, data: str, run: str, warm_start: str) -> TrainConfig:
        settled = [f"data={data}", f"run={run}"] + ([f"warm_start.run={warm_start}"] if warm_start else [])
        return from_words([*self.train, *settled])

    def content(self) -> dict[str, Any]:
        """What decides a night's outcome, to tell whether it is begun again as another one."""
        o = self.own
        recommend = asdict(o.recommend) if o.recommendations else None
        return {
            "window": o.window,
            "zone": o.zone,
            "prepare": self.prepare,
            "train": self.train,
            "recommend": recommend,
        }


def read_words(words: Sequence[str]) -> Request:
    """UserError: an option that is nobody's, set by the night itself, given twice, or of a value that cannot be."""
    given = pairs(words)
    from_file = _from_file(given["config"]) if given.get("config") else {}
    merged = from_file | given
    for value in merged.values():
        refuse_secrets(value)
    own_fields = fields_of(NightlyOptions)
    own = values_of([f"{n}={v}" for n, v in merged.items() if n in own_fields], own_fields)
    groups: dict[str, Any] = {
        group: cls(**{n.removeprefix(f"{group}."): own.pop(n) for n in list(own) if n.startswith(f"{group}.")})
        for group, cls in (("gate", GateOptions), ("drift", DriftOptions), ("recommend", ListOptions))
    }
    rest = {n: v for n, v in merged.items() if n not in own_fields}
    for name in rest:
        check(name not in SETTLED, f"{name}=: is set by the night itself: {SETTLED.get(name)}")
    of_prepare, of_train = of_prepare_and_train([f"{n}={v}" for n, v in rest.items()])
    found = Request(NightlyOptions(**own, **groups), of_prepare, of_train)
    for name in ("source", "target"):
        check(DATE in rest.get(name, ""), f"{name}={rest.get(name, '')}: name the logs by day, as logs/books/{DATE}/")
    found.prepare_options("out", "")  # checks the rest
    _check_recipe(found.train_config("data", "run", ""))
    return found


def _check_recipe(config: TrainConfig) -> None:
    """UserError: one that a night cannot start, or that makes nothing to publish."""
    recipe = config.recipe
    if not recipe.target:
        raise UserError(f"recipe={recipe.name}: knows no target items, so there is nothing to publish; take recipe=uaf")
    if recipe.phases and recipe.phases[0].start == "pretrained":
        raise UserError(
            f"recipe={recipe.name}: fine-tunes a pre-trained run, and a night starts from the published model alone; "
            "take recipe=uaf, which pre-trains and fine-tunes every night (recipe.transfer= may be another way)"
        )


def check_day(prepare: Sequence[str], date: str) -> None:
    """UserError: the day itself has no log in a domain (of an earlier day prepare only warns)."""
    named = dict(word.split("=", 1) for word in prepare)
    for role in ("source", "target"):
        for log in named[role].split(","):
            of_day = log.replace(DATE, date)
            if not ("*" in of_day or storage.is_folder(of_day) or storage.exists(of_day)):
                raise UserError(f"{of_day}: not found: the {role} has no log of {date} yet")


def _from_file(uri: str) -> dict[str, str]:
    """A YAML file's entries as words: nested ones dotted, lists as train writes them. UserError: not such a file."""
    try:
        raw = yaml.safe_load(storage.read_bytes(uri))
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" in line {place.line + 1}" if place else ""
        raise UserError(f"config={uri}: is no YAML{where}") from error
    check(isinstance(raw, dict), f"config={uri}: must hold options, as `source: s3://logs/books/{DATE}/`")
    flat = _flat(raw)
    check("date" not in flat and "config" not in flat, f"config={uri}: date and config are given with the command")
    return flat


def _flat(node: Mapping[Any, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in node.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            found[f"{prefix}{name}"] = str(value).lower()
        elif isinstance(value, list):
            found[f"{prefix}{name}"] = "[" + ",".join(map(str, value)) + "]"
        else:
            found[f"{prefix}{name}"] = "null" if value is None else str(value)
    return found


def _is_day(text: str) -> bool:
    try:
        return bool(re.fullmatch(r"\d{4}-\d\d-\d\d", text)) and bool(datetime.date.fromisoformat(text))
    except ValueError:
        return False
