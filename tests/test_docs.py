"""Every program that the manual shows runs on two ranks, and is shown as it runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.harness.launch import launch
from tests.harness.ranks import import_early

import_early("ringattn.hf")  # some of the programs use transformers

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example: Path) -> None:
    launch(example)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_shown_and_asserts(example: Path) -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert f"{{literalinclude}} examples/{example.name}" in pages
    assert re.search(r"^\s*(assert |torch\.testing\.assert_close\()", example.read_text(encoding="utf-8"), re.M)


def test_readme_shows_the_first_example() -> None:
    """What the README shows is what runs, character by character."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert blocks == [(ROOT / "docs" / "examples" / "first.py").read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_pages_hold_no_other_programs(page: Path) -> None:
    """Code on a page is included from docs/examples, where it is run."""
    assert "```python" not in page.read_text(encoding="utf-8")
