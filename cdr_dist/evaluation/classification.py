"""Accuracy and F1 of predicted classes, by torchmetrics."""

from __future__ import annotations

import torch
from torch import Tensor

METRICS = ("accuracy", "f1")


def classification(predicted: Tensor, true: Tensor, classes: int, positive: int = 1) -> dict[str, float]:
    """`accuracy` and `f1` of rows [n] of classes 0..classes-1 (int64); NaN without rows.

    f1: of two classes that of `positive`, 0 where it neither occurs nor is predicted; of more the mean over the classes
    that occur or are predicted, each counting the same: a class that nobody has and nobody is taken for is left out.
    """
    assert predicted.shape == true.shape, (predicted.shape, true.shape)
    if not len(true):
        return dict.fromkeys(METRICS, float("nan"))
    from torchmetrics.functional.classification import binary_f1_score, multiclass_f1_score  # takes seconds to load

    if classes == 2:
        f1 = binary_f1_score((predicted == positive).long(), (true == positive).long())
    else:
        f1 = multiclass_f1_score(predicted, true, num_classes=classes, average="macro")
    # torchmetrics counts right ones in float32, which is exact up to 2^24 rows only
    return {"accuracy": int((predicted == true).sum()) / len(true), "f1": float(f1)}


def most_likely(scores: Tensor) -> Tensor:
    """The class of each row [n] of scores [n, classes]: the best one's number, of equal ones the smallest."""
    return torch.argmax(scores, dim=1)
