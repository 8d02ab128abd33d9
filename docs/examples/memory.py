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
    """Returns causal self-attention for this rank's rows."""
    return ring_attention(x, x, x, mask=causal(), layout=layout)


# Activation checkpointing: the backward recomputes the attention, and sends keys and values again.
(plain,) = torch.autograd.grad(attend(x).square().sum(), x)
(recomputed,) = torch.autograd.grad(checkpoint(attend, x, use_reentrant=False).square().sum(), x)
torch.testing.assert_close(recomputed, plain)

# Autocast: fp32 inputs are cast; accumulation stays in fp32.
with torch.autocast("cpu", dtype=torch.bfloat16):
    assert attend(x).dtype == torch.bfloat16
assert attend(x).dtype == torch.float32

# Under no_grad nothing is saved for a backward.
with torch.no_grad():
    assert not attend(x).requires_grad
dist.destroy_process_group()
