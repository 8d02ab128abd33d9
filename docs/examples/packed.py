"""Packed documents do not see each other, wherever the shards are cut."""

import torch
import torch.distributed as dist

from ringattn import balanced, causal, documents, ring_attention, shard, unshard

dist.init_process_group("gloo")
torch.manual_seed(0)
ends = [0, 37, 38, 90, 133]  # documents of 37, 1, 52 and 43 tokens
mask = documents(ends) & causal()
layout = balanced(mask, ends[-1], dist.get_world_size())


def attend(x: torch.Tensor) -> torch.Tensor:
    """Self-attention of the whole of x, computed shard by shard."""
    local = shard(x, layout)
    return unshard(ring_attention(local, local, local, mask=mask, layout=layout), layout)


x = torch.randn(1, ends[-1], 2, 8)
changed = x.clone()
changed[:, 38:90] += 1.0  # the third document

same = (attend(x) == attend(changed)).all(-1).all(-1)[0]
assert same[:38].all()
assert same[90:].all()
assert not same[38:90].any()
dist.destroy_process_group()
