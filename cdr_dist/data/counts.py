"""The table of counts that prepare prints, in the shape of the paper's Table 4."""

from __future__ import annotations

from cdr_dist.data.dataset import LEFT_OUT, POSITIVES, SEQUENCES, SPLITS, UNKNOWN_SOURCE, Manifest


def counts_table(manifest: Manifest) -> str:
    """Users, items and behaviours of each domain, examples of each split, and what training never saw."""
    counts = manifest.counts
    names = (manifest.source_domain, manifest.target_domain)
    width = max(12, *(len(name) + 2 for name in names))
    lines = [
        f"{'':12}{names[0]:>{width}}{names[1]:>{width}}",
        f"{'role':12}{'source':>{width}}{'target':>{width}}",
        f"{'log users':12}" + "".join(f"{counts[f'{role}_log_users']:>{width},}" for role in ("source", "target")),
        f"{'users':12}{counts['users']:>{width},}{counts['users']:>{width},}",
    ]
    cold = counts.get("cold_users", 0)
    lines.append(f"{'cold users':12}{cold:>{width},}{'':{width}}  of one log alone: no examples, but a row in users/")
    for what in ("items", "behaviours"):
        lines.append(f"{what:12}" + "".join(f"{counts[f'{role}_{what}']:>{width},}" for role in ("source", "target")))
    for split, positives in zip(SPLITS, POSITIVES, strict=True):
        rows = manifest.examples(split)
        share = f"  {counts[positives] / rows:.1%} positive" if manifest.label == "rating" and rows else ""
        lines.append(f"{split:12}{'':{width}}{rows:>{width},}{share}")
    for name in SEQUENCES:
        if manifest.examples(name):
            lines.append(f"{name:16}{manifest.examples(name):>{width + 8},}")
    for why, what in zip(LEFT_OUT, ("an unknown item", "too short a source history"), strict=True):
        if counts.get(why):
            lines.append(f"target behaviours without an example, for {what}: {counts[why]:,}")
    for name in UNKNOWN_SOURCE:
        if unknown := manifest.unknown[name]:
            lines.append(f"{name}: unknown items {unknown:.1%} of positive source behaviours")
    for split, shares in manifest.unseen.items():
        lines.append(f"{split}: users that training never saw {shares['user']:.1%}, items {shares['item']:.1%} of rows")
    return "\n".join(lines)
