"""Masks compose by &, and each row of a batch may have its own."""

import torch
import torch.distributed as dist
from einops import rearrange

from ringattn import causal, documents, prefix_lm, ring_attention, shard, sliding_window, striped, unshard

dist.init_process_group("gloo")
torch.manual_seed(0)
length = 101
q, k, v = torch.randn(3, 2, length, 4, 16)

row_masks = [
    sliding_window(left=20) & documents([0, 60, 101]),  # row 0: two documents, a causal window of 20 in each
    prefix_lm(30),  # row 1: everyone sees the first 30 positions; the rest is causal
]
layout = striped(length, dist.get_world_size())
local = [shard(x, layout) for x in (q, k, v)]
out = unshard(ring_attention(*local, mask=row_masks, layout=layout), layout)

i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
allowed = torch.stack(
    [
        (j <= i) & (j - i >= -20) & ((i < 60) == (j < 60)),
        (j < 30) | (j <= i),
    ]
)
q, k, v = (rearrange(x, "batch seq head dim -> batch head seq dim") for x in (q, k, v))
expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None])
torch.testing.assert_close(out, rearrange(expected, "batch head seq dim -> batch seq head dim"))

assert causal() & sliding_window(5) == sliding_window(5) & causal()  # masks are values
dist.destroy_process_group()
