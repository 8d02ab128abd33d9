"""Every program that the manual shows runs on two ranks, and is shown as it runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
PAGES = sorted((ROOT / "docs").glob("*.md"))
TIMEOUT_S = 300.0


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*launcher, str(example)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-8000:]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_shown_and_asserts(example: Path) -> None:
    assert any(f"{{literalinclude}} examples/{example.name}" in page.read_text(encoding="utf-8") for page in PAGES)
    assert re.search(r"^\s*(assert |torch\.testing\.assert_close\()", example.read_text(encoding="utf-8"), re.M)


def test_readme_shows_the_first_example() -> None:
    """What the README shows is what runs, character by character."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert blocks == [(ROOT / "docs" / "examples" / "first.py").read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_pages_hold_no_other_programs(page: Path) -> None:
    """Code on a page is included from docs/examples, where it is run."""
    assert "```python" not in page.read_text(encoding="utf-8")
