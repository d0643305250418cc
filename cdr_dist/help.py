"""The options of a job as text, read from the dataclasses' source: importing them would take seconds."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_WIDTH, _INDENT = 110, 36
_CHOSEN = ("model", "recipe", "preset")
"""Options whose values are files of configs/."""


@dataclass(frozen=True)
class Option:
    name: str
    default: str
    meaning: str


def describe_options() -> str:
    """Every option of jobs/train.py with its default and meaning, in groups, and the files that can be chosen."""
    parts = [_lines([*top(), *choices()])]
    for name, meaning, options in groups():
        parts.append(f"{name}: {meaning}\n" + _lines(options))
    return "Options (key=value, with their defaults; lists as [64,32], nothing as null):\n" + "\n\n".join(parts)


@dataclass(frozen=True)
class _Class:
    prefix: str
    module: str
    name: str

    @property
    def meaning(self) -> str:
        return (ast.get_docstring(_definition(self.module, self.name)) or "").splitlines()[0]


def top() -> Iterator[Option]:
    """Options of jobs/train.py that are in no group, but for those that choose files."""
    for option in _options(_Class("", "cdr_dist.configuration", "TrainConfig")):
        if option.name not in _CHOSEN:
            yield option


def choices() -> Iterator[Option]:
    """Options of jobs/train.py whose values are files of configs/, and what these are."""
    for group in _CHOSEN:
        default = next(
            line.split(":")[1].strip()
            for line in (ROOT / "configs" / "train.yaml").read_text().splitlines()
            if line.strip().startswith(f"- {group}:")
        )
        meanings = [f"{name}: {about}" if about else name for name, about in files(group).items()]
        yield Option(group, default, "\n".join(meanings))


def files(group: str) -> dict[str, str]:
    """The files of configs/GROUP, with the comment that each begins with."""
    found = {}
    for file in sorted((ROOT / "configs" / group).glob("*.yaml")):
        lines = [line for line in file.read_text().splitlines() if not line.startswith("# @package")]
        found[file.stem] = lines[0].removeprefix("# ") if lines and lines[0].startswith("# ") else ""
    return found


def groups() -> Iterator[tuple[str, str, list[Option]]]:
    """(name, meaning, options) of nested options, by the annotation of TrainConfig's fields."""
    for name, annotation, _, _ in _fields("cdr_dist.configuration", "TrainConfig"):
        found = _find("cdr_dist.configuration", annotation)
        if found is not None and name not in _CHOSEN:
            cls = _Class(f"{name}.", *found)
            yield name, cls.meaning, list(_options(cls))


def _options(cls: _Class) -> Iterator[Option]:
    for name, annotation, default, meaning in _fields(cls.module, cls.name):
        if _find(cls.module, annotation) is None:
            yield Option(cls.prefix + name, default, meaning)


def _fields(module: str, name: str) -> Iterator[tuple[str, str, str, str]]:
    """(name, annotation, default, docstring) of a dataclass's fields, its bases' first."""
    definition = _definition(module, name)
    for base in definition.bases:
        found = _find(module, ast.unparse(base))
        if found is not None:
            yield from _fields(*found)
    for node, following in zip(definition.body, [*definition.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            said = following.value if isinstance(following, ast.Expr) else None
            meaning = said.value if isinstance(said, ast.Constant) and isinstance(said.value, str) else ""
            yield node.target.id, ast.unparse(node.annotation), _default(module, node.value), " ".join(meaning.split())


def _default(module: str, node: ast.expr | None) -> str:
    """As it would be typed."""
    if isinstance(node, ast.Call):
        factory = node.keywords[0].value
        if isinstance(factory, ast.Name) and factory.id == "dict":
            return "{}"
        return _default(module, factory.body) if isinstance(factory, ast.Lambda) else "[]"
    if isinstance(node, ast.List):
        return "[" + ",".join(_default(module, element) for element in node.elts) + "]"
    if isinstance(node, ast.Name):
        return next(
            _default(module, n.value)
            for n in _tree(module).body
            if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == node.id
        )
    if isinstance(node, ast.Constant):
        value = node.value
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return "" if node is None else ast.unparse(node)


def _find(module: str, name: str) -> tuple[str, str] | None:
    """The module and name of a class of this package that `module` defines or imports."""
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, name
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cdr_dist."):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _find(node.module or "", alias.name)
    return None


def _definition(module: str, name: str) -> ast.ClassDef:
    return next(n for n in _tree(module).body if isinstance(n, ast.ClassDef) and n.name == name)


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse((ROOT / Path(*module.split("."))).with_suffix(".py").read_text())


def _lines(options: list[Option]) -> str:
    found = []
    for option in options:
        start = f"  {option.name}={option.default}"
        meaning = [line for part in option.meaning.split("\n") for line in textwrap.wrap(part, _WIDTH - _INDENT)] or [
            ""
        ]
        if len(start) >= _INDENT:
            found.append(start)
            start = ""
        found += [(start if i == 0 else "").ljust(_INDENT) + line for i, line in enumerate(meaning)]
    return "\n".join(line.rstrip() for line in found)
