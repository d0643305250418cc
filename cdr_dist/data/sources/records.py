"""Text with a record a line: JSON, or Python literals as old files have them; gzip is told by a file's first bytes."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

from cdr_dist.data import storage
from cdr_dist.data.sources import table
from cdr_dist.errors import UserError

BLOCK_BYTES = 1 << 22
LONGEST_LINE = 1 << 26
GZIP = b"\x1f\x8b"


def lines(uri: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1. UserError: a line that is no text, or endless."""
    number = 0
    for block in _blocks(uri):
        for raw in block:
            number += 1
            if len(raw) > LONGEST_LINE:
                raise UserError(f"{uri}: line {number}: is longer than {LONGEST_LINE >> 20} MiB")
            try:
                line = raw.decode().strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{uri}: line {number}: is not UTF-8 text (byte {error.start + 1})") from None
            if line:
                yield number, line.removeprefix("\ufeff") if number == 1 else line


def _blocks(uri: str) -> Iterator[list[bytes]]:
    """The lines of a file, some at a time; one that is too long comes as far as it was read."""
    with storage.naming(uri), table.opened_text(uri) as file:
        text = table.decompressed(file, file.peek(len(GZIP)).startswith(GZIP))
        kept: list[bytes] = []
        size = 0
        while block := text.read(BLOCK_BYTES):
            *whole, rest = block.split(b"\n")
            if whole:
                whole[0] = b"".join([*kept, whole[0]])
                kept, size = [], 0
                yield whole
            kept.append(rest)
            size += len(rest)
            if size > LONGEST_LINE:
                break
        yield [b"".join(kept)]


def record_of(line: str) -> dict[str, Any]:
    """The record of a line, in JSON or as a Python literal, which is read and never run. UserError: neither."""
    try:
        record = _parsed(line)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise UserError(f"neither JSON nor a Python literal ({_reason(error)})") from None
    if not isinstance(record, dict):
        raise UserError(f"{shown(line)} is not a record")
    return record


def shown(value: Any) -> str:
    """As messages show it: short, and ASCII."""
    shown = repr(value).encode("ascii", "backslashreplace").decode()
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, character {error.pos + 1}"
    if isinstance(error, SyntaxError):
        return error.msg + (f", character {error.offset}" if error.offset else "")
    if isinstance(error, MemoryError | RecursionError):
        return "nested too deeply"
    malformed = str(error).startswith("malformed node")
    return "holds more than values" if malformed else str(error).partition(";")[0]


def _parsed(line: str) -> Any:
    if line.startswith("{'"):  # JSON never does
        try:
            return json.loads(_as_json(line))
        except (ValueError, SyntaxError):
            return _literal(line)
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        try:
            return _literal(line)
        except (ValueError, SyntaxError):
            raise error from None


def _as_json(line: str) -> str:
    """The same value in JSON, where a literal holds what `repr` of texts, numbers, lists and dicts writes.

    Of other literals JSON's reader refuses the result: all that changes is how texts are quoted. It is four times as
    fast as `ast.literal_eval`.
    """
    if '"' not in line and "\\" not in line:
        return line.replace("'", '"')
    return _TOKENS.sub(_token_as_json, line)


_TOKENS = re.compile(
    r"""((?:[^'"\\]++|'[^'"\\]*+')++)|("[^"\\]*+")|('(?:[^'\\]++|\\.)*+'|"(?:[^"\\]++|\\.)*+")|(.)""", re.DOTALL
)
"""1: what is between texts, and plain texts in single quotes; 2: a plain text in double quotes; 3: any other text."""


def _token_as_json(match: re.Match[str]) -> str:
    token = match.group()
    if match.lastindex == 1:
        return token.replace("'", '"')
    if match.lastindex == 2:
        return token
    if match.lastindex == 3:
        return _escaped_as_json(token)
    raise ValueError("a quote or a backslash alone")


def _escaped_as_json(token: str) -> str:
    if "\\\\" in token or "\\/" in token or (token[0] == "'" and '\\"' in token):
        return json.dumps(ast.literal_eval(token))
    # Each backslash begins an escape, and those that JSON knows mean there what they mean here.
    inner = token[1:-1].replace("\\'", "'").replace("\\x", "\\u00")
    return f'"{inner}"' if token[0] == '"' else '"' + inner.replace('"', '\\"') + '"'


def _literal(line: str) -> Any:
    """UserError's causes: SyntaxError, ValueError where it holds more than values, such as a call."""
    try:
        return ast.literal_eval(line)
    except ValueError:
        return ast.literal_eval(_NamedNumbers().visit(ast.parse(line, mode="eval")))


class _NamedNumbers(ast.NodeTransformer):
    """`nan` and `inf`, which `repr` writes and a literal cannot hold."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(float(node.id)) if node.id.lower() in ("nan", "inf") else node
