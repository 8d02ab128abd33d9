"""Causal attention over a sequence that is spread over all ranks, and over the same in one process."""

import torch
import torch.distributed as dist

from ringattn import causal, ring_attention, shard, unshard, zigzag

dist.init_process_group("gloo")  # "nccl" on GPUs
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 1001, 8, 64)  # each (batch, positions, heads, head_dim); any length will do

layout = zigzag(1001, dist.get_world_size())  # who holds which positions
local = [shard(x, layout) for x in (q, k, v)]  # this rank's rows
out = unshard(ring_attention(*local, mask=causal(), layout=layout), layout)

q, k, v = (x.transpose(1, 2) for x in (q, k, v))
expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
torch.testing.assert_close(out, expected)
print(f"rank {dist.get_rank()} of {dist.get_world_size()}: the same as in one process")
dist.destroy_process_group()
