"""Grouped heads, a sink, a softcap, log-sum-exp, and keys of another sequence."""

import torch
import torch.distributed as dist

from ringattn import contiguous, ring_attention, ring_attention_with_lse, shard, unshard, zigzag

dist.init_process_group("gloo")
world = dist.get_world_size()
torch.manual_seed(0)
q = torch.randn(1, 50, 8, 16)  # 8 query heads
k = torch.randn(1, 77, 2, 16)  # 2 kv heads: query heads 0 to 3 use the first, 4 to 7 the second
v = torch.randn(1, 77, 2, 24)  # values may have another head dim
sink = torch.linspace(-1.0, 1.0, 8)  # one logit per query head, the same on all ranks

# Cross-attention: 50 queries over 77 keys, each sharded by a layout of its own.
layout, kv_layout = zigzag(50, world), contiguous(77, world)
local_q, local_k, local_v = shard(q, layout), shard(k, kv_layout), shard(v, kv_layout)
options = {"layout": layout, "kv_layout": kv_layout, "scale": 0.2, "softcap": 5.0, "sink": sink}
out, lse = ring_attention_with_lse(local_q, local_k, local_v, **options)

# The same by hand.
scores = 0.2 * torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(4, dim=2))
scores = 5.0 * torch.tanh(scores / 5.0)
logits = torch.cat([scores, sink[None, :, None, None].expand(1, 8, 50, 1)], dim=-1)
weights = logits.softmax(-1)[..., :77]
expected = torch.einsum("bhqk,bkhd->bqhd", weights, v.repeat_interleave(4, dim=2))
torch.testing.assert_close(unshard(out, layout), expected)
torch.testing.assert_close(unshard(lse, layout, dim=2), logits.logsumexp(-1))

torch.testing.assert_close(ring_attention(local_q, local_k, local_v, **options), out)
dist.destroy_process_group()
