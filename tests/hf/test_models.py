"""Models over the ranks of a group are the models in one process: logits, loss, and the gradient of every parameter."""

from __future__ import annotations

import pytest

from tests.harness.ranks import RankPool
from tests.hf.architectures import ARCHITECTURES, PAGE, Architecture, table
from tests.hf.programs import (
    CU_SEQ_LENS,
    KINDS,
    LEFT,
    PACKED,
    PLAIN,
    RIGHT,
    SHORT,
    UNEVEN_LABELS,
    Kind,
    check_equal,
)

LAYOUTS = ("contiguous", "zigzag", "striped", "balanced")
DECODER = "GptOssForCausalLM"  # windows, sinks and experts


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_equals_one_process(pool: RankPool, architecture: Architecture) -> None:
    pool.run(check_equal, 2, architecture.model, "zigzag", "auto", UNEVEN_LABELS)


@pytest.mark.parametrize("kind", [LEFT, RIGHT, PACKED, CU_SEQ_LENS, SHORT], ids=str)
def test_kinds_of_batches(pool: RankPool, kind: Kind) -> None:
    pool.run(check_equal, 3, DECODER, "zigzag", "auto", kind)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        # Chunks are counted from the first token of a row, or of a document.
        ("Llama4ForCausalLM", LEFT),
        ("Llama4ForCausalLM", PACKED),
        ("ModernBertForMaskedLM", PACKED),
        # The decoder must not see the encoder's padding.
        ("BartForConditionalGeneration", LEFT),
        ("BartForConditionalGeneration", RIGHT),
    ],
    ids=str,
)
def test_padding_and_documents(pool: RankPool, model: str, kind: Kind) -> None:
    pool.run(check_equal, 2, model, "zigzag", "auto", kind)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(pool: RankPool, layout: str) -> None:
    pool.run(check_equal, 2, DECODER, layout, "auto", PLAIN)


@pytest.mark.long
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_all(pool: RankPool, architecture: Architecture, kind: Kind, layout: str, world_size: int) -> None:
    if not (kind.documents and architecture.encodes):
        pool.run(check_equal, world_size, architecture.model, layout, "auto", kind)


@pytest.mark.long
@pytest.mark.parametrize("exchange", ["ring", "gather", "ulysses"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_exchanges(pool: RankPool, architecture: Architecture, exchange: str) -> None:
    pool.run(check_equal, 3, architecture.model, "zigzag", exchange, LEFT)


def test_the_manual_lists_what_is_tested() -> None:
    assert PAGE.read_text(encoding="utf-8") == table(), "python -m tests.hf.architectures writes it"
