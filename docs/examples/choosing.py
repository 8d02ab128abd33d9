"""Let the plans choose the exchange: a cost model measured once, and what it says."""

import torch
import torch.distributed as dist

from ringattn import (
    CostModel,
    balanced,
    causal,
    context_parallel_attention,
    documents,
    explain,
    measure_compute,
    measure_link,
    ring_attention,
    shard,
)

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
q, k, v = (torch.randn(1, 1000, 4, 32) for _ in range(3))
mask = documents([0, 300, 310, 700, 1000]) & causal()
layout = balanced(mask, 1000, world)
q, k, v = (shard(x, layout).requires_grad_() for x in (q, k, v))

# Once, when the program starts.
model = CostModel(measure_link(), measure_compute(dtype=q.dtype, head_dim=32))

out = context_parallel_attention(q, k, v, mask=mask, layout=layout, model=model)
torch.testing.assert_close(out, ring_attention(q, k, v, mask=mask, layout=layout))

# What was chosen, and why. And the same of a mesh of 64 ranks that do not exist, from shapes alone.
choice = explain(q, k, v, mask=mask, layout=layout, model=model)
shapes = [torch.empty(1, 512, 4, 32, device="meta", requires_grad=True) for _ in range(3)]
larger = explain(*shapes, (8, 8), mask=causal(), model=model)
assert choice.chosen is not None
assert larger.chosen is not None
if rank == 0:
    print(choice)
    print(larger)
dist.destroy_process_group()
