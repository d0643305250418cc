"""What prepare must write, computed slowly: plain loops over plain rows, from the definitions in the documents."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pyarrow as pa

from cdr_dist.data import hashing

Row = tuple[str, str, int, float]  # user, item, timestamp, rating


def _label(o: Any) -> Any:
    return (lambda rating: 1.0) if o.labels == "sampled" else (lambda rating: float(rating > o.threshold))


def _drawn(o: Any, name: str, user: str, *more: int) -> float:
    """The number in (0, 1) that a user, or a behaviour, has for ever."""
    return float(hashing.uniform(hashing.mix(hashing.key(o.seed, name), hashing.of_keys(pa.array([user])), *more))[0])


def _part(drawn: float, valid: float, test: float) -> str:
    return "test" if drawn < test else "valid" if drawn < test + valid else "train"


def expected_examples(source: list[Row], target: list[Row], o: Any) -> dict[tuple[str, int], dict[str, Any]]:
    """(user, number among the user's examples) -> the example, with keys in place of ids."""
    label = _label(o)
    examples: dict[tuple[str, int], dict[str, Any]] = {}
    for user in sorted({r[0] for r in target}):
        own = sorted((r for r in target if r[0] == user and r[1] != o.unknown), key=lambda r: r[2])
        other = sorted((r for r in source if r[0] == user), key=lambda r: r[2])
        if o.users == "both" and not other:
            continue
        short = [sum(r[2] < row[2] and label(r[3]) for r in other) < o.least_history for row in own]
        if all(short):
            continue
        n = short.count(False)
        if o.split == "time":
            splits = ["train" if r[2] < o.valid_from else "valid" if r[2] < o.test_from else "test" for r in own]
        elif o.split == "leave_last":
            splits = ["train"] * (len(own) - 2) + ["valid", "test"] if n >= 3 else ["train"] * len(own)
        else:
            places = [(place,) if o.split == "instance" else () for place in range(len(own))]
            splits = [_part(_drawn(o, "split", user, *place), o.valid_share, o.test_share) for place in places]
        splits = ["none" if s else split for s, split in zip(short, splits, strict=True)]
        held_out = [r[2] for r, s in zip(own, splits, strict=True) if s in ("valid", "test")]
        limit = o.valid_from if o.split == "time" else held_out[0] if held_out else own[-1][2]
        trains = [r for r, s in zip(own, splits, strict=True) if s == "train"]
        for place, (row, split) in enumerate(zip(own, splits, strict=True)):
            if split == "none":
                continue
            before = trains if o.history == "train" else own[:place]
            until = limit if o.history == "train" else row[2]
            examples[user, place - short.count(True)] = {
                "split": split,
                "item": row[1],
                "label": label(row[3]),
                "timestamp": row[2],
                "target_history": [r[1] for r in before if label(r[3])][-o.history_length :],
                "source_history": [_known(r[1], o) for r in other if r[2] < until and label(r[3])][-o.history_length :],
                "source_history_first": max(0, sum(r[2] < until and label(r[3]) for r in other) - o.history_length),
                "source_candidates": [
                    (r[1], label(r[3]), r[2], sum(label(r[3]) for r in other[:i]))
                    for i, r in enumerate(other)
                    if r[2] < limit and r[1] != o.unknown
                ],
                "target_candidates": [(r[1], label(r[3])) for r in trains],
                "position": splits[:place].count("train") if split == "train" else -1,
                "positives": {r[1] for r in own if label(r[3])},
            }
    return examples


def _known(item: str, o: Any) -> str:
    return "<unknown>" if item == o.unknown else item


def expected_sequences(source: list[Row], target: list[Row], o: Any) -> dict[tuple[str, str], list[list[str]]]:
    """(user or <unknown>, split) -> all windows of those users, sorted."""
    trained, found = {user for user, _ in expected_examples(source, target, o)}, defaultdict(list)
    for user in {r[0] for r in source} if o.sequences else ():
        own = sorted((r for r in source if r[0] == user), key=lambda r: r[2])
        items = [_known(r[1], o) for r in own if _label(o)(r[3])]
        part = _part(_drawn(o, "sequences", user), o.sequences_valid_share, o.sequences_test_share)
        while len(items) > 1:
            found[user if user in trained else "<unknown>", part].append(items[: o.sequences])
            items = items[o.sequences - 1 :]
    return {of: sorted(windows) for of, windows in found.items()}


def expected_users(source: list[Row], target: list[Row], o: Any) -> dict[str, dict[str, Any]]:
    """User -> the row in users/, with keys in place of ids; <unknown> what only users without examples have."""
    label, trained = _label(o), {user for user, _ in expected_examples(source, target, o)}
    in_source, in_target = ({r[0] for r in log} for log in (source, target))
    target = [r for r in target if r[1] != o.unknown]
    users: dict[str, dict[str, Any]] = {}
    for user in sorted(in_source | in_target if o.cold_users else trained):
        found: dict[str, Any] = {"user": user if user in trained else "<unknown>"}
        for role, log in (("target", target), ("source", source)):
            whose = in_source if role == "source" and o.sequences else trained
            known = {r[1] for r in log if r[0] in whose} - {o.unknown}
            own = sorted((r for r in log if r[0] == user), key=lambda r: r[2])
            rows = [(r[1] if r[1] in known else "<unknown>", label(r[3])) for r in own]
            positives = [item for item, liked in rows if liked]
            found[f"{role}_history"] = positives[-o.history_length :]
            if role == "source":
                before = sum(liked for _, liked in rows[:-1])
                found["source_candidates"] = [(*rows[-1], before)] if rows else []
                found["source_history_first"] = max(0, len(positives) - o.history_length)
            else:
                found["seen"] = {item for item, _ in rows} - {"<unknown>"}
        users[user] = found
    return users
