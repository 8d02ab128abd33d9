"""The decoder: stages in sequence equal the whole, packed documents are independent, invalid sizes raise."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import ringattn
from ringattn.errors import ArgumentError
from ringattn.parallel import Decoder, DecoderConfig, MoESpec
from ringattn.types import Masks
from tests.harness.oracle import plain_attention

CONFIG = DecoderConfig(vocab_size=37, num_layers=3, dim=24, num_heads=6, num_kv_heads=2, hidden=40)
ENDS = [0, 5, 6, 17]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Masks) -> Tensor:
    """Causal attention within documents, with the mask as a dense tensor."""
    at = torch.arange(q.shape[1])
    document = torch.searchsorted(torch.tensor(ENDS), at, right=True)
    allowed = (at[None] <= at[:, None]) & (document[None] == document[:, None])
    return plain_attention(q, k, v, allowed)[0]


def _model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIG).double()


def _run(model: Decoder, x: Tensor) -> Tensor:
    positions = torch.cat([torch.arange(end - start) for start, end in pairwise(ENDS)])[None]
    mask = ringattn.documents(ENDS) & ringattn.causal()
    logits: Tensor = model(x, positions=positions, mask=mask, attention_fn=_attend)
    return logits


def test_stages_in_sequence_equal_the_whole() -> None:
    whole = _model()
    tokens = torch.randint(CONFIG.vocab_size, (2, ENDS[-1]))
    first, middle, last = (copy.deepcopy(whole) for _ in range(3))
    for part, kept in ((first, "0"), (middle, "1"), (last, "2")):
        for name in {"0", "1", "2"} - {kept}:
            del part.layers[name]
    first.norm = first.head = middle.embed = middle.norm = middle.head = last.embed = None
    assert set(middle.state_dict()) == {name for name in whole.state_dict() if name.startswith("layers.1.")}
    assert torch.equal(_run(last, _run(middle, _run(first, tokens))), _run(whole, tokens))


def test_packed_documents_are_independent() -> None:
    model = _model()
    tokens = torch.randint(CONFIG.vocab_size, (1, ENDS[-1]))
    logits = _run(model, tokens)
    changed = tokens.clone()
    changed[:, :6] = (changed[:, :6] + 1) % CONFIG.vocab_size
    assert torch.equal(_run(model, changed)[:, 6:], logits[:, 6:])
    assert not torch.equal(_run(model, changed)[:, :6], logits[:, :6])


def test_indivisible_sizes_raise() -> None:
    with pytest.raises(ArgumentError, match="dim=24: must be num_heads=5"):
        DecoderConfig(vocab_size=5, num_layers=1, dim=24, num_heads=5, num_kv_heads=5, hidden=8)
    with pytest.raises(ArgumentError, match="num_heads=6: must be a multiple of num_kv_heads=4"):
        DecoderConfig(vocab_size=5, num_layers=1, dim=24, num_heads=6, num_kv_heads=4, hidden=8)


def test_moe_and_moe_factory_must_be_given_together() -> None:
    moe = MoESpec(num_experts=4, top_k=2, hidden=8)
    config = DecoderConfig(vocab_size=5, num_layers=1, dim=24, num_heads=6, num_kv_heads=2, hidden=8, moe=moe)
    with pytest.raises(ArgumentError, match="together"):
        Decoder(config)
    with pytest.raises(ArgumentError, match="together"):
        Decoder(CONFIG, moe_factory=lambda config: torch.nn.Identity())
