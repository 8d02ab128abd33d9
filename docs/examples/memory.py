"""Activation checkpointing, autocast and no_grad work as they do around torch's own attention."""

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from ringattn import causal, ring_attention, shard, zigzag

dist.init_process_group("gloo")
torch.manual_seed(0)
layout = zigzag(200, dist.get_world_size())
x = shard(torch.randn(1, 200, 4, 16), layout).requires_grad_()


def attend(x: torch.Tensor) -> torch.Tensor:
    """Causal self-attention of this rank's rows."""
    return ring_attention(x, x, x, mask=causal(), layout=layout)


# Checkpointing: the backward recomputes the attention, keys/values travelling once more.
(plain,) = torch.autograd.grad(attend(x).square().sum(), x)
(recomputed,) = torch.autograd.grad(checkpoint(attend, x, use_reentrant=False).square().sum(), x)
torch.testing.assert_close(recomputed, plain)

# Autocast: fp32 inputs are cast, sums are still accumulated in fp32.
with torch.autocast("cpu", dtype=torch.bfloat16):
    assert attend(x).dtype == torch.bfloat16
assert attend(x).dtype == torch.float32

# Without gradients nothing is kept for a backward.
with torch.no_grad():
    assert not attend(x).requires_grad
dist.destroy_process_group()
