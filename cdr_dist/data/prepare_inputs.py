"""What the options of prepare name, found and measured: the files of every domain, and the dataset that is extended."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from cdr_dist.data import interactions, storage
from cdr_dist.data.earlier import Earlier
from cdr_dist.data.feature_names import USER
from cdr_dist.data.prepare_options import DATE, ONE_LOG, PrepareOptions
from cdr_dist.data.sources import formats
from cdr_dist.data.sources.formats import Source
from cdr_dist.errors import UserError

log = logging.getLogger(__name__)

PARTITION_BYTES = 64 << 20
MOST_PARTITIONS = 1024
COMPRESSION = 4
"""Bytes of text for a byte of .gz or Parquet, about."""


@dataclass(frozen=True)
class Domain:
    """prefix: of its items' and categories' keys, where several domains share a role. value: what a row says that is of
    this domain; empty: all rows of its log are."""

    name: str
    files: list[str]
    item_file: str
    prefix: str
    value: str


@dataclass(frozen=True)
class Inputs:
    domains: dict[str, list[Domain]]  # role -> one domain, or several sources
    bytes: dict[str, int]  # role -> of all its files
    partitions: int
    earlier: Earlier | None  # the dataset that is extended


def inputs_of(options: PrepareOptions) -> Inputs:
    """UserError: a file that is missing, cannot be read or lacks a column; domains of one name; extends= that does not
    fit."""
    storage.use(options.storage.options)
    source = formats.of(options.format)
    domains = {role: _domains(options, role) for role in ("source", "target")}
    names = [domain.name for of_role in domains.values() for domain in of_role]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"both domains are named {twice[0]}: give source_domain= or target_domain=")
    for role, of_role in domains.items():
        for domain in of_role:
            for uri in domain.files:
                needed = interactions.needed_columns(options, role, source.column_names(uri), bool(domain.item_file))
                source.require_columns(uri, needed)
            if domain.item_file:
                interactions.check_item_file(domain.item_file, options, role)
    if options.user_file:
        interactions.check_user_file(options)
    files = {role: [uri for domain in of_role for uri in domain.files] for role, of_role in domains.items()}
    sizes = {uri: storage.size(uri) for uris in files.values() for uri in uris}
    plain = {uri for uri in sizes if source.is_text(uri) and not uri.endswith(".gz")}
    text = sum(size if uri in plain else COMPRESSION * size for uri, size in sizes.items())
    count = options.partitions or min(MOST_PARTITIONS, -(-text // PARTITION_BYTES))
    target = domains["target"][0].name
    earlier = Earlier(options.extends, target) if options.extends else None
    if earlier is not None:
        features = {of: list(options.features_of(of)) for of in (*domains, USER)}
        earlier.check([domain.name for domain in domains["source"]], features)
        if not earlier.knows("target"):
            was = earlier.manifest.target_domain
            log.info("extends=%s: its target is %s, so the ids of %s are new", options.extends, was, target)
    return Inputs(domains, {role: sum(sizes[u] for u in uris) for role, uris in files.items()}, max(1, count), earlier)


def _domains(options: PrepareOptions, role: str) -> list[Domain]:
    """The domains of a role. UserError: other numbers of logs and of names or item files; a name with a colon."""
    source = formats.of(options.format)
    logs = getattr(options, role).split(",") if role == "source" else [getattr(options, role)]
    by_value, one_log = options.by_value(role), options.format in ONE_LOG
    if by_value and len(logs) == 1 and options.several_sources and role == "source":
        logs *= options.source_domain.count(",") + 1
    given = {}
    for option in ("items", "domain"):
        text = getattr(options, f"{role}_{option}")
        given[option] = text.split(",") if text and len(logs) > 1 else [text] * len(logs)
        if len(given[option]) != len(logs):
            raise UserError(f"{role}_{option}={text}: {len(given[option])} for {len(logs)} logs of {role}=")
    found = []
    for uri, items, own_name in zip(logs, given["items"], given["domain"], strict=True):
        name = own_name or _domain_name(source, uri) + (f"-{role}" if one_log else "")
        if len(logs) > 1 and ":" in name:
            raise UserError(f"{role}_domain={name}: with several sources, a name has no colon")
        files = _files(source, uri, options.dates)
        if one_log and (twice := _named_twice(files)):
            raise UserError(f"{uri}: two files are named {twice}, and users are named by file and line; rename one")
        value = name if by_value else role if one_log else ""
        found.append(Domain(name, files, items, f"{name}:" if len(logs) > 1 else "", value))
    return found


def _named_twice(files: list[str]) -> str:
    names = [uri.rsplit("/", 1)[-1] for uri in files]
    return next((name for name in names if names.count(name) > 1), "")


def _domain_name(source: Source, uri: str) -> str:
    """Of logs by day what does not change: `logs/books/{date}/` and `logs/books-{date}.csv` are books."""
    if DATE in uri:
        before, _, after = uri.partition(DATE)
        uri = before.rstrip("/-_.") + ("" if "/" in after else after)
    return source.domain_name(uri)


def _files(source: Source, uri: str, dates: Sequence[str]) -> list[str]:
    """The files of a log; of one by day those of all its days, of which some may be missing."""
    if DATE not in uri:
        return source.files(uri)
    found, missing = [], []
    for date in dates:
        of_day = uri.replace(DATE, date)
        if "*" in of_day or storage.is_folder(of_day) or storage.exists(of_day):
            found += source.files(of_day)
        else:
            missing.append(date)
    if not found:
        raise UserError(f"{uri}: not found, of no day from {dates[0]} to {dates[-1]}")
    if missing:
        log.warning("%s: %d of %d days are missing: %s", uri, len(missing), len(dates), ", ".join(missing[:5]))
    return found
