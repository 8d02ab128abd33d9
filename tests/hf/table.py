"""The table of architectures in the manual: `python -m tests.hf.table` writes it."""

from __future__ import annotations

from pathlib import Path

from tests.hf.architectures import ARCHITECTURES
from tests.hf.images import SEEING

PAGE = Path(__file__).parents[2] / "docs" / "hf_architectures.md"


def table() -> str:
    """Returns the table, of all models that are tested."""
    rows = sorted(f"| `{entry}` | {entry.asks_for} |" for entry in (*ARCHITECTURES, *SEEING))
    return "\n".join(["| model | its layers ask for |", "|---|---|", *rows, ""])


if __name__ == "__main__":
    PAGE.write_text(table(), encoding="utf-8")
