"""What the documents show works as shown."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from cdr_dist.configuration import from_words
from cdr_dist.training.launch import train
from tests import datasets

ROOT = Path(__file__).resolve().parent.parent


def test_the_backbone_of_the_document_trains_with_every_recipe(tmp_path, monkeypatch):
    text = (ROOT / "docs/backbone.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    assert len(code.splitlines()) <= 45
    (tmp_path / "my_models.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    target = re.search(r"model=custom model\._target_=\S+", text).group(0).split()
    for recipe in ("target_only", "source_features", "joint", "biao"):
        config = from_words(
            [*target, f"recipe={recipe}", f"run={tmp_path}/{recipe}", f"data={datasets.rated()}", "batch.size=64"]
            + ["trainer.workers=0", "trainer.max_steps=12", "upper.interval=5"]
        )
        summary = train(config, config.data, quiet=True)
        assert summary["steps"] == 12
        assert summary["model"] == "twodots"
    sys.modules.pop("my_models", None)


def test_files_that_documents_name_exist():
    for document in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"]:
        text = (ROOT / document).read_text()
        for path in re.findall(r"\]\(([\w/.-]+\.md)\)", text) + re.findall(
            r"`((?:jobs|configs|tests|docs)/[\w/.]+)`", text
        ):
            assert (ROOT / path.rstrip("/")).exists(), f"{document} names {path}"


def test_what_the_operations_page_quotes_is_what_the_code_says():
    """Every quoted message, cut at its dots and numbers, stands in the source."""
    page = (ROOT / "docs" / "operations.md").read_text().partition("## What to do when")[2].partition("## Back")[0]
    sources = "\n".join(path.read_text() for path in (ROOT / "cdr_dist").rglob("*.py"))
    told = re.sub(r'"\s*\n\s*f?"', "", sources)
    quoted = [
        q for row in page.splitlines() if row.startswith("| ") for q in re.findall(r"`([^`]+)`", row.split("|")[1])
    ]
    fragments = [part.strip(" ,:()") for q in quoted for part in re.split(r"…|DATE|\d{4}-\d\d-\d\d", q)]
    assert len(quoted) >= 15
    assert [part for part in fragments if len(part) > 3 and part not in told] == []
