"""The table of architectures in the manual: `python -m tests.hf.architecture_table` writes it."""

from __future__ import annotations

from pathlib import Path

from tests.hf.architectures import ARCHITECTURES
from tests.hf.multimodal_models import MULTIMODAL_MODELS

PAGE = Path(__file__).parents[2] / "docs" / "hf_architectures.md"


def table() -> str:
    """Returns the table, of all models that are tested."""
    rows = sorted(f"| `{entry}` | {entry.features} |" for entry in (*ARCHITECTURES, *MULTIMODAL_MODELS))
    return "\n".join(["| model | attention features |", "|---|---|", *rows, ""])


if __name__ == "__main__":
    PAGE.write_text(table(), encoding="utf-8")
