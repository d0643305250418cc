"""tools/planted.py: a shape in words becomes a dataset, a mistake one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import planted

from cdr_dist.errors import UserError


def test_a_shape_in_words_becomes_a_dataset(tmp_path, capsys):
    planted.main([f"out={tmp_path}/data", "users=40", "helpful=2", "neutral=0", "harmful=3", "source_items=10"])
    assert capsys.readouterr().out.strip() == f"{tmp_path}/data: 40 users, categories: 2 helpful, 0 neutral, 3 harmful"
    shape = json.loads((tmp_path / "data/planted.json").read_text())
    assert (shape["users"], shape["harmful"], shape["own_tastes"]) == (40, 3, 4)


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["users=4"], "give out="), (["out=x", "user=4"], "users"), (["out=x", "users=many"], "users=many: not a whole")],
)
def test_a_mistake_is_one_line(words, expected):
    with pytest.raises(UserError) as error:
        planted.main(words)
    assert expected in str(error.value)
