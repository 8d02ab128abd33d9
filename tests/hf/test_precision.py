"""fp32 and bf16: a patched model is as close to float64 as the unpatched one in the same dtype is."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import ringattn.hf as rhf
from tests.harness.compare import FLOOR_FACTOR, assert_within_rule
from tests.harness.ranks import RankPool
from tests.hf.architectures import architecture
from tests.hf.comparison import UNEVEN_LABELS, one_process, sharded


def _within_the_rule(group: dist.ProcessGroup, name: str, dtype: torch.dtype) -> None:
    batch, model = UNEVEN_LABELS.batch(), architecture(name).build(dtype)
    model.set_attn_implementation("eager")
    exact = one_process(architecture(name).build(dtype).double(), batch)  # of the same, rounded weights
    plain = one_process(model, batch)
    with rhf.patch(model, group) as handle:
        ours = sharded(model, handle, batch, group)
    assert_within_rule(ours[0], exact[0], plain[0], name="logits")
    # The loss is in fp32, of logits in this dtype: the floor is as many roundings there.
    floor = FLOOR_FACTOR * torch.finfo(dtype).eps / torch.finfo(ours[1].dtype).eps
    assert_within_rule(ours[1], exact[1], plain[1], name="loss", floor_factor=floor)
    assert plain[2].keys() == exact[2].keys() == ours[2].keys()
    for parameter, grad in ours[2].items():
        assert_within_rule(grad, exact[2][parameter], plain[2][parameter], name=f"gradient of {parameter}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_within_the_rule(pool: RankPool, model: str, dtype: torch.dtype) -> None:
    pool.run(_within_the_rule, 2, model, dtype)
