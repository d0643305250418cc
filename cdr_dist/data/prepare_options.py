"""The options of prepare: one dataclass, and the way from `key=value` words to it."""

from __future__ import annotations

import dataclasses
import datetime
import math
from dataclasses import dataclass, field
from typing import Any

from cdr_dist.data import scenarios
from cdr_dist.data.feature_names import USER, can_be_declared
from cdr_dist.data.options import StorageOptions
from cdr_dist.data.words import apart, check, described, fields_of, option, values_of
from cdr_dist.errors import UserError, nearest

ONE_LOG = {"coldrec": "0", "windows": "-1"}
"""Formats whose log holds both domains, without ratings and times -> the id of an unknown item."""
CHOICES = {
    "format": ("table", "amazon", "recbole", *ONE_LOG),
    "labels": ("rating", "sampled"),
    "split": ("leave_last", "time", "instance", "user"),
    "users": ("both", "target"),
    "vocab": ("all", "train"),
    "history": ("past", "train"),
    "eval_sampling": ("uniform", "popularity"),
    "eval_exclude": ("positives", "train", "item"),
}
REQUIRED = ("source", "target", "out")
OWN = tuple(f"{role}_{group}." for role in ("source", "target") for group in ("columns", "item_columns"))
"""Options that hold for one domain's files only; empty: what columns.* and item_columns.* say."""
STAND_FOR_MORE = {
    "source_columns.*, target_columns.*": "as columns.*, for one domain's log only",
    "source_item_columns.*, target_item_columns.*": "as item_columns.*, for one domain's item file only",
    "scenario=, raw=": "options of configs/scenario/NAME.yaml, and the folder of its downloads",
}
"""Words beside those of the dataclass's fields, which OWN leaves out of --help."""
DATE = "{date}"
"""In the names of logs by day."""
NOT_CONTENT = ("out", "workers", "partitions", "storage.deadline_s", "storage.tries", "storage.backoff_s")
"""Options that never change a byte of the dataset, so the manifest leaves them out."""


@dataclass(frozen=True)
class Columns:
    """Names of the log's columns. A name that is not the default must be in the log."""

    user: str = option("user_id", "column of the user's id")
    item: str = option("item_id", "column of the item's id")
    timestamp: str = option("timestamp", "column of the time: whole seconds, or any whole number that orders")
    rating: str = option("rating", "column of the rating; read only with labels=rating")
    category: str = option("category", "column of the item's category; used where no item file is given")
    domain: str = option(
        "", "column of the row's domain, where a log holds several; source_domain= and target_domain= are values"
    )


@dataclass(frozen=True)
class ItemColumns:
    """Names of the item files' columns."""

    item: str = option("item_id", "item file: column of the item's id")
    category: str = option("category", "item file: column of the category")
    features: str = option(
        "", "item file: columns that models may read, as brand,title:words,tags:| with how values part"
    )


@dataclass(frozen=True)
class UserColumns:
    """Names of the user file's columns."""

    user: str = option("user_id", "user file: column of the user's id")
    features: str = option("", "user file: columns that models may read, as age,region,tags:| with how values part")


@dataclass(frozen=True)
class Storage:
    """As in training; what only training needs is left out."""

    deadline_s: float = option(StorageOptions.deadline_s, "longest wait for one request to a disk or store, in s")
    tries: int = option(StorageOptions.tries, "how often a request is sent before it counts as failed")
    backoff_s: float = option(StorageOptions.backoff_s, "longest wait before the second try, in s; then doubling")

    @property
    def options(self) -> StorageOptions:
        return StorageOptions(self.deadline_s, self.tries, self.backoff_s)


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare and how. UserError on a value that is out of range or contradicts another."""

    source: str = option(
        "", "log of the source domain: a file, folder, pattern or URI; with commas: of several domains"
    )
    target: str = option(
        "", "log of the target domain; not needed where one log holds both (columns.domain=, coldrec, windows)"
    )
    out: str = option("", "folder of the dataset, local or a URI; must not hold anything else")
    format: str = option(
        "table",
        "of the logs; table: csv, tsv, Parquet; amazon: reviews; recbole: .inter; coldrec, windows: a user a line",
    )
    source_items: str = option("", "file of the source items' categories; with commas: a file a domain")
    target_items: str = option("", "file of the target items' categories")
    user_file: str = option("", "file of the users: what user_columns.features names of it")
    source_domain: str = option("", "name of the source domain, or names with commas; empty: the log's file name")
    target_domain: str = option("", "name of the target domain; empty: the log's file name")
    unknown_item: str = option(
        "", "id that stands for any unknown item; empty: coldrec 0, windows -1, other formats none"
    )
    columns: Columns = field(default_factory=Columns)
    item_columns: ItemColumns = field(default_factory=ItemColumns)
    source_columns: Columns = field(default_factory=lambda: Columns(*[""] * 6))
    target_columns: Columns = field(default_factory=lambda: Columns(*[""] * 6))
    source_item_columns: ItemColumns = field(default_factory=lambda: ItemColumns(*[""] * 3))
    target_item_columns: ItemColumns = field(default_factory=lambda: ItemColumns(*[""] * 3))
    user_columns: UserColumns = field(default_factory=UserColumns)
    labels: str = option("rating", "rating: label 1 where rating > threshold; sampled: all 1, negatives drawn")
    threshold: float = option(3.0, "ratings above it are positive (labels=rating)")
    eval_negatives: int = option(1, "negatives stored with a validation or test row (labels=sampled)")
    eval_sampling: str = option(
        "uniform", "how these are drawn; popularity: by an item's training behaviours, to eval_power"
    )
    eval_power: float = option(1.0, "popularity: behaviours to this power are the weights of a draw")
    eval_replacement: bool = option(False, "whether an item may be drawn for a row more than once")
    eval_exclude: str = option(
        "positives",
        "not drawn; positives: the user's in any split; train: those in training and the row's item; item: that alone",
    )
    classes: int = option(0, "N: the target log's items are classes 0..N-1, all of which the dataset knows; 0: items")
    split: str = option(
        "leave_last", "leave_last: last behaviour test, last but one validation; time; instance, user: by shares"
    )
    valid_from: int | None = option(None, "first timestamp of validation (split=time)")
    test_from: int | None = option(None, "first timestamp of test (split=time)")
    valid_share: float = option(0.05, "share of validation (split=instance: of the examples; split=user: of the users)")
    test_share: float = option(0.15, "share of test, likewise")
    train_share: float = option(
        1.0, "share of the training examples that is kept, by a draw; validation and test stay as they are"
    )
    least_history: int = option(
        0, "target behaviours with fewer positive source behaviours before them make no example"
    )
    days: str = option(
        "", "FROM..TO, as 2026-11-01..2026-11-24: the days that {date} in source= and target= stands for"
    )
    since: int | None = option(None, "behaviours with an earlier timestamp are left out")
    until: int | None = option(None, "behaviours with this timestamp or a later one are left out")
    extends: str = option(
        "",
        "an earlier dataset: its users, items and categories keep their ids, new ones come behind; of another target "
        "domain those of users and source",
    )
    forgotten: str = option(
        "", "a dataset's forgotten.json (jobs/forget.py): whose behaviours are left out; with extends= its own counts"
    )
    users: str = option("both", "both: users of both domains; target: all of the target domain's")
    cold_users: bool = option(True, "rows in users/ also for users without examples: of one domain's log alone")
    vocab: str = option("all", "all: ids for all that occurs; train: only for what training may see")
    history: str = option("past", "past: positives before each behaviour; train: all training positives")
    history_length: int = option(50, "longest stored history, the most recent kept")
    candidates: int = option(100, "most source candidates of a user, by seeded sample")
    sequences: int = option(0, "longest source sequence to pre-train on, of every source user; 0: none are written")
    sequences_valid_share: float = option(0.05, "share of the users whose sequences are validation")
    sequences_test_share: float = option(0.05, "share of the users whose sequences are test")
    feature_items: int = option(2, "least items or users that share a value of a declared column; rarer are unknown")
    feature_values: int = option(20, "most values of one item or user in a declared column")
    seed: int = option(8, "seed of every draw")
    workers: int = option(0, "0: in this process; N: N Ray tasks at a time")
    partitions: int = option(0, "user partitions; 0: by the input's size. Memory is bounded by one")
    rows_per_shard: int = option(1_000_000, "rows of an output file, about")
    storage: Storage = field(default_factory=Storage)

    def __post_init__(self) -> None:
        if all(self.domain_column(role) for role in ("source", "target")):  # one log may hold both
            object.__setattr__(self, "source", self.source or self.target)
            object.__setattr__(self, "target", self.target or self.source)
        for name in REQUIRED:
            check(bool(getattr(self, name)), f"{name}= is missing")
        for name, known in CHOICES.items():
            value = getattr(self, name)
            check(value in known, f"{name}={value}: {nearest(str(value), list(known))}")
        for name, least in (
            ("eval_negatives", 1),
            ("history_length", 1),
            ("candidates", 1),
            ("least_history", 0),
            ("sequences", 0),
            ("feature_items", 1),
            ("feature_values", 1),
            ("classes", 0),
            ("workers", 0),
            ("partitions", 0),
            ("rows_per_shard", 1),
        ):
            value = getattr(self, name)
            check(value >= least, f"{name}={value}: must be {least} or more")
        check(0 < self.eval_power < math.inf, f"eval_power={self.eval_power}: must be above 0 and finite")
        check(self.classes != 1, "classes=1: there must be two or more")
        check(math.isfinite(self.threshold), f"threshold={self.threshold}: must be a finite number")
        check(not (self.forgotten and self.extends), "forgotten= goes without extends=, whose dataset has its own")
        self._check_times()
        self._check_shares()
        self._check_domains()
        check(self.sequences != 1, "sequences=1: a sequence has 2 behaviours or more; 0: none are written")
        check(
            not self.sequences or self.cold_users, "sequences= goes with cold_users=true, by whose rows users are found"
        )
        named = [name for name in ("source", "target") if DATE in getattr(self, name)]
        check(bool(named) == bool(self.days), "days= and {date} in source= or target= belong together")
        _ = self.dates  # checks them
        for of in ("source", "target", USER):
            self.features_of(of)
        _ = self.storage.options  # checks them

    @property
    def dates(self) -> list[str]:
        """The days that `days` names."""
        if not self.days:
            return []
        first, last = (_day(text, self.days) for text in (self.days.split("..") + [""])[:2])
        check(first <= last, f"days={self.days}: ends before it begins")
        return [str(first + datetime.timedelta(n)) for n in range((last - first).days + 1)]

    def _check_times(self) -> None:
        since, until = self.since, self.until
        if since is not None and until is not None:
            check(since < until, f"since={since} must be before until={until}")
        valid_from, test_from = self.valid_from, self.test_from
        if self.split != "time":
            check(valid_from is None and test_from is None, "valid_from= and test_from= need split=time")
            return
        if valid_from is None or test_from is None:
            raise UserError("split=time needs valid_from= and test_from=")
        check(valid_from < test_from, f"valid_from={valid_from} must be before test_from={test_from}")

    def _check_shares(self) -> None:
        check(0 < self.train_share <= 1, f"train_share={self.train_share}: must be above 0, and 1 at most")
        for start in ("", "sequences_"):
            valid, test = (getattr(self, f"{start}{of}_share") for of in ("valid", "test"))
            check(
                valid >= 0 and test >= 0 and valid + test < 1,
                f"{start}valid_share={valid}, {start}test_share={test}: must be 0 or more, and less than 1 together",
            )

    def _check_domains(self) -> None:
        form = f"format={self.format}"
        if self.format in ONE_LOG:
            check(self.labels == "sampled", f"{form}: has no ratings; give labels=sampled")
            check(
                not (self.source_items or self.target_items or self.user_file),
                f"{form}: has no item or user files; leave out source_items=, target_items= and user_file=",
            )
        check(not self.user_file or bool(self.user_columns.features), "user_file=: needs user_columns.features=")
        for role in ("source", "target"):
            if self.by_value(role):
                what = form if self.format in ONE_LOG else f"{self.columns_of(role)['domain'][0]}="
                given = bool(getattr(self, f"{role}_domain"))
                check(given, f"{what}: needs {role}_domain=, the domain whose rows are the {role}'s")

    def domain_column(self, role: str) -> str:
        """The column that names a row's domain; empty: all rows are of the role's one."""
        return self.columns_of(role)["domain"][1] or ("domain" if self.format in ONE_LOG else "")

    def by_value(self, role: str) -> bool:
        """Whether the role's domains are values of that column, and not, as with coldrec, the roles themselves."""
        return bool(self.domain_column(role)) and self.format != "coldrec"

    @property
    def unknown(self) -> str:
        """The id of an unknown item; empty: there is none."""
        return self.unknown_item or ONE_LOG.get(self.format, "")

    @property
    def several_sources(self) -> bool:
        return "," in (self.source_domain if self.by_value("source") else self.source)

    @property
    def stored_negatives(self) -> int:
        """Negatives of each validation and test row."""
        return self.eval_negatives if self.labels == "sampled" else 0

    def features_of(self, role: str) -> dict[str, str]:
        """Declared columns of a domain's item file, or of the user file (role="user") -> what makes values of a text:
        "" (it is one), words, or what parts them.

        UserError: a name that cannot be a feature's, one twice, no such file.
        """
        option, text = "user_columns.features", self.user_columns.features
        if role != USER:
            option, text = self.columns_of(role, "item_columns")["features"]
        found: dict[str, str] = {}
        for word in filter(None, text.split(",")):
            name, _, how = word.partition(":")
            check(can_be_declared(name), f"{option}={text}: '{name}' cannot be a feature's name")
            check(name not in found, f"{option}={text}: names {name} twice")
            found[name] = how
        file = "user_file" if role == USER else f"{role}_items"
        check(not found or bool(getattr(self, file)), f"{option}={text}: needs {file}=")
        return found

    def columns_of(self, role: str, group: str = "columns") -> dict[str, tuple[str, str]]:
        """Of a domain's log (or its item file, group="item_columns"): name -> (option that says so, column)."""
        own, general = getattr(self, f"{role}_{group}"), getattr(self, group)
        found = {}
        for f in dataclasses.fields(general):
            of_own = getattr(own, f.name)
            option = f"{role}_{group}.{f.name}" if of_own else f"{group}.{f.name}"
            found[f.name] = (option, of_own or getattr(general, f.name))
        return found

    def content(self) -> dict[str, Any]:
        """Flat `name -> value` of the options that decide the dataset's content."""
        flat = {name: _get(self, name) for name in option_names()}
        return {
            n: value
            for n, value in flat.items()
            if n not in NOT_CONTENT
            and (value or not n.startswith((*OWN, "forgotten", "user_file")))
            and (self.user_file or not n.startswith("user_columns."))
        }


def _day(text: str, of: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise UserError(f"days={of}: write FROM..TO, as 2026-11-01..2026-11-24") from None


def _get(options: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        options = getattr(options, name)
    return options


def option_names() -> list[str]:
    """All names as typed, dotted where nested."""
    return list(fields_of(PrepareOptions))


def options_from_words(words: list[str]) -> PrepareOptions:
    """Options from `name=value` words; values are literal. UserError: unknown name, wrong type, given twice.

    scenario= and raw= stand for the words of one of the paper's scenarios, which others of the same name replace.
    """
    words = with_scenario(words)[0]
    return _build(values_of(words, fields_of(PrepareOptions)))


def with_scenario(words: list[str]) -> tuple[list[str], str]:
    """The words with a scenario's in place of scenario= and raw=, and the scenario's name."""
    own, rest = apart(words, {"scenario": "", "raw": ""})
    if not any(own.values()):
        return words, ""
    if not own["scenario"] or not own["raw"]:
        raise UserError("scenario= and raw=, the folder of its downloads, belong together")
    given = {word.partition("=")[0] for word in rest}
    of_scenario = scenarios.words_of(own["scenario"], own["raw"])
    return [word for word in of_scenario if word.partition("=")[0] not in given] + rest, own["scenario"]


def _build(given: dict[str, Any]) -> PrepareOptions:
    flat = {name: value for name, value in given.items() if "." not in name}
    for group, cls in (("columns", Columns), ("item_columns", ItemColumns)):
        for role in ("", "source_", "target_"):
            start = f"{role}{group}."
            own = {n.removeprefix(start): v for n, v in given.items() if n.startswith(start)}
            unset = {f.name: "" for f in dataclasses.fields(cls)} if role else {}
            flat[role + group] = cls(**unset | own)
    users = {n.removeprefix("user_columns."): v for n, v in given.items() if n.startswith("user_columns.")}
    flat["user_columns"] = UserColumns(**users)
    flat["storage"] = Storage(**{n.removeprefix("storage."): v for n, v in given.items() if n.startswith("storage.")})
    return PrepareOptions(**flat)


def describe_options() -> str:
    """One line for each option: name, default, meaning."""
    shown = {name: of for name, of in fields_of(PrepareOptions).items() if not name.startswith(OWN)}
    lines = described(shown, REQUIRED) + [f"  {name:34} {doc}" for name, doc in STAND_FOR_MORE.items()]
    return "\n".join(lines)
