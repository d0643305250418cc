"""What prepare must write, computed slowly: plain loops over plain rows, from the definitions in the documents."""

from __future__ import annotations

from typing import Any

Row = tuple[str, str, int, float]  # user, item, timestamp, rating


def expected_examples(source: list[Row], target: list[Row], o: Any) -> dict[tuple[str, int], dict[str, Any]]:
    """(user, place among the user's target behaviours) -> the example, with keys in place of ids."""
    label = (lambda rating: 1.0) if o.labels == "sampled" else (lambda rating: float(rating > o.threshold))
    examples: dict[tuple[str, int], dict[str, Any]] = {}
    for user in sorted({r[0] for r in target}):
        own = sorted((r for r in target if r[0] == user), key=lambda r: r[2])
        other = sorted((r for r in source if r[0] == user), key=lambda r: r[2])
        if o.users == "both" and not other:
            continue
        n = len(own)
        if o.split == "time":
            splits = ["train" if r[2] < o.valid_from else "valid" if r[2] < o.test_from else "test" for r in own]
            limit = o.valid_from
        else:
            splits = ["train"] * (n - 2) + ["valid", "test"] if n >= 3 else ["train"] * n
            limit = own[-2][2] if n >= 3 else own[-1][2]
        trains = [r for r, s in zip(own, splits, strict=True) if s == "train"]
        for place, (row, split) in enumerate(zip(own, splits, strict=True)):
            before = trains if o.history == "train" else own[:place]
            until = limit if o.history == "train" else row[2]
            examples[user, place] = {
                "split": split,
                "item": row[1],
                "label": label(row[3]),
                "timestamp": row[2],
                "target_history": [r[1] for r in before if label(r[3])][-o.history_length :],
                "source_history": [r[1] for r in other if r[2] < until and label(r[3])][-o.history_length :],
                "source_history_first": max(0, sum(r[2] < until and label(r[3]) for r in other) - o.history_length),
                "source_candidates": [
                    (r[1], label(r[3]), r[2], sum(label(r[3]) for r in other[:i]))
                    for i, r in enumerate(other)
                    if r[2] < limit
                ],
                "target_candidates": [(r[1], label(r[3])) for r in trains],
                "position": place if split == "train" else -1,  # training rows come first
                "positives": {r[1] for r in own if label(r[3])},
            }
    return examples


def expected_users(source: list[Row], target: list[Row], o: Any) -> dict[str, dict[str, Any]]:
    """User -> the row in users/, with keys in place of ids; <unknown> what only users without examples have."""
    label = (lambda rating: 1.0) if o.labels == "sampled" else (lambda rating: float(rating > o.threshold))
    in_source, in_target = ({r[0] for r in log} for log in (source, target))
    trained = in_source & in_target if o.users == "both" else in_target
    users: dict[str, dict[str, Any]] = {}
    for user in sorted(in_source | in_target if o.cold_users else trained):
        found: dict[str, Any] = {"user": user if user in trained else "<unknown>"}
        for role, log in (("target", target), ("source", source)):
            known = {r[1] for r in log if r[0] in trained}
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
