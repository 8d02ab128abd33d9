"""Models over the ranks of a group are the models in one process: logits, loss, and the gradient of every parameter."""

from __future__ import annotations

from itertools import product

import pytest

from tests.harness.ranks import RankPool
from tests.hf.architecture_table import PAGE, table
from tests.hf.architectures import ARCHITECTURES, Architecture
from tests.hf.comparison import (
    BATCH_SPECS,
    CU_SEQ_LENS,
    LEFT,
    PACKED,
    PLAIN,
    RIGHT,
    SHORT,
    UNEVEN_LABELS,
    BatchSpec,
    check_equal,
)

LAYOUTS = ("contiguous", "zigzag", "striped", "balanced")
# On one rank all layouts are one.
SHARDINGS = [("zigzag", 1), *product(LAYOUTS, (2, 3, 4))]
# An encoder-decoder has no packed documents.
PAIRS = [(a, spec) for a, spec in product(ARCHITECTURES, BATCH_SPECS) if not (spec.documents and a.is_encoder_decoder)]
DECODER = "GptOssForCausalLM"  # windows, sinks and experts


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_equals_one_process(pool: RankPool, architecture: Architecture) -> None:
    pool.run(check_equal, 2, architecture.model, "zigzag", "auto", UNEVEN_LABELS)


@pytest.mark.parametrize("spec", [LEFT, RIGHT, PACKED, CU_SEQ_LENS, SHORT], ids=str)
def test_batch_specs(pool: RankPool, spec: BatchSpec) -> None:
    pool.run(check_equal, 3, DECODER, "zigzag", "auto", spec)


@pytest.mark.parametrize(
    ("model", "spec"),
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
def test_padding_and_documents(pool: RankPool, model: str, spec: BatchSpec) -> None:
    pool.run(check_equal, 2, model, "zigzag", "auto", spec)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(pool: RankPool, layout: str) -> None:
    pool.run(check_equal, 2, DECODER, layout, "auto", PLAIN)


@pytest.mark.long
@pytest.mark.parametrize(("layout", "world_size"), SHARDINGS)
@pytest.mark.parametrize(("architecture", "spec"), PAIRS, ids=str)
def test_all(pool: RankPool, architecture: Architecture, spec: BatchSpec, layout: str, world_size: int) -> None:
    pool.run(check_equal, world_size, architecture.model, layout, "auto", spec)


@pytest.mark.long
@pytest.mark.parametrize("exchange", ["ring", "gather", "ulysses"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_exchanges(pool: RankPool, architecture: Architecture, exchange: str) -> None:
    pool.run(check_equal, 3, architecture.model, "zigzag", exchange, LEFT)


def test_the_manual_lists_the_tested_architectures() -> None:
    assert PAGE.read_text(encoding="utf-8") == table(), "python -m tests.hf.architecture_table writes it"
