"""Rotary embeddings that depend on the largest position use the maximum over all ranks."""

from __future__ import annotations

import pytest
import torch.distributed as dist

import ringattn.hf as rhf
from tests.harness.compare import assert_close
from tests.harness.ranks import RankPool
from tests.hf.architectures import ROTARIES, architecture
from tests.hf.comparison import BatchSpec, one_process, sharded

# They keep what they grew to, and forget it when a batch is short again: below 8, above it, less, below, far above.
BATCH_SPECS = [BatchSpec(str(length), sizes=(2, length)) for length in (6, 13, 11, 5, 18)]
PACKED = BatchSpec("packed", documents=(11, 2))


def _as_one_process(group: dist.ProcessGroup, name: str, layout: str) -> None:
    alone, model = architecture(name).build(), architecture(name).build()
    with rhf.patch(model, group, layout=layout) as handle:
        for spec in (*BATCH_SPECS, PACKED):
            logits, loss, grads = one_process(alone, spec.batch())
            ours = sharded(model, handle, spec.batch(), group)
            assert_close(ours[0], logits, atol=1e-10, name=f"logits of {spec}")
            assert_close(ours[1], loss, atol=1e-10, name=f"loss of {spec}")
            for parameter, grad in ours[2].items():
                assert_close(grad, grads[parameter], atol=1e-10, name=f"gradient of {parameter}, {spec}")
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("name", ROTARIES)
def test_as_in_one_process(pool: RankPool, name: str, layout: str) -> None:
    pool.run(_as_one_process, 2, name, layout)
