"""Options typed as `name=value` words: from the fields of a dataclass, nested ones with dotted names."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from cdr_dist.errors import UserError, nearest

Fields = dict[str, tuple[type, "dataclasses.Field[Any]"]]
"""Name as typed -> type and field."""


def option(default: Any, doc: str) -> Any:
    """A field with its meaning, which `--help` shows."""
    return dataclasses.field(default=default, metadata={"doc": doc})


def fields_of(cls: type, prefix: str = "") -> Fields:
    types = typing.get_type_hints(cls)
    found: Fields = {}
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(types[f.name]):
            found |= fields_of(types[f.name], f"{prefix}{f.name}.")  # type: ignore[arg-type]
        else:
            found[prefix + f.name] = (types[f.name], f)
    return found


def check(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def values_of(words: list[str], fields: Fields) -> dict[str, Any]:
    """Name -> value of the given words; values are literal. UserError: unknown name, wrong type, given twice."""
    given = words_of(words, list(fields))
    return {name: _value(name, text, fields[name][0]) for name, text in given.items()}


def pair_of(word: str) -> tuple[str, str]:
    """Name and value. UserError: not written so."""
    name, equals, value = word.partition("=")
    check(bool(equals), f"'{word}': options are written key=value")
    return name, value


def pairs(words: Sequence[str]) -> dict[str, str]:
    """Name -> value. UserError: not written so, given twice."""
    found: dict[str, str] = {}
    for name, value in map(pair_of, words):
        check(name not in found, f"{name}= is given twice")
        found[name] = value
    return found


def words_of(words: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """The words of a job that knows these options alone. UserError: another one, given twice."""
    found = pairs(words)
    for name in found:
        check(name in known, f"{name}: unknown option; {nearest(name, list(known))}")
    return found


def apart(words: Sequence[str], own: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The values of some names, over their defaults `own`, and the other words as they are. UserError: given twice."""
    is_own = [word.partition("=")[0] in own for word in words]
    given = pairs([word for word, mine in zip(words, is_own, strict=True) if mine])
    return {**own, **given}, [word for word, mine in zip(words, is_own, strict=True) if not mine]


def whole_number(name: str, text: str, least: int) -> int:
    """UserError: anything else."""
    number = int(text) if text.isascii() and text.isdigit() else least - 1
    check(number >= least, f"{name}={text}: must be a whole number, at least {least}")
    return number


def described(fields: Fields, required: tuple[str, ...] = ()) -> list[str]:
    """One line for each option: name, default, meaning."""
    lines = []
    for name, (_, f) in fields.items():
        default = "(required)" if name in required else "" if f.default is None else f.default
        default = str(default).lower() if isinstance(default, bool) else default
        lines.append(f"  {name + '=' + str(default):34} {f.metadata['doc']}")
    return lines


def _value(name: str, text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if kind is bool:
        check(text in ("true", "false"), f"{name}={text}: true or false")
        return text == "true"
    number = float if kind is float else int
    try:
        return number(text)
    except ValueError:
        what = "a number" if number is float else "a whole number"
        raise UserError(f"{name}={text}: not {what}") from None
