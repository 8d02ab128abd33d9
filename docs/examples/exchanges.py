"""Four ways to the same result; what each sends is known before anything is sent."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ringattn import (
    contiguous,
    gather_attention,
    hybrid_attention,
    ring_attention,
    shard,
    sliding_window,
    ulysses_attention,
)
from ringattn.plan.exchanges import Gather, Ring, build_plan
from ringattn.plan.payload import AttentionShape

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("ring", "ulysses"))  # with more ranks: (2, 4), (4, 2), ...

torch.manual_seed(0)
q, k, v = torch.randn(1, 1000, 6, 32), torch.randn(1, 1000, 3, 32), torch.randn(1, 1000, 3, 32)
mask, layout = sliding_window(99), contiguous(1000, world)
local = [shard(x, layout) for x in (q, k, v)]

ring = ring_attention(*local, mask=mask, layout=layout)
gather = gather_attention(*local, mask=mask, layout=layout)
ulysses = ulysses_attention(*local, mask=mask, layout=layout, stages=3)
hybrid = hybrid_attention(*local, mesh, mask=mask, layout=layout)
for other in (gather, ulysses, hybrid):
    torch.testing.assert_close(other, ring)

# The window reaches 99 rows back. A ring sends whole shards, a gather those rows only.
sizes = AttentionShape(batch=1, heads=6, kv_heads=3, head_dim=32, v_head_dim=32, itemsize=4, sum_itemsize=4)
sent = {
    exchange.name: build_plan(exchange, (mask,), layout, layout, 0).forward.bytes_sent(sizes)
    for exchange in (Ring(), Gather())
}
if world == 2:
    assert sent == {"ring": 500 * sizes.batch * 3 * 64 * 4, "gather": 99 * 3 * 64 * 4}
print(f"rank {rank} of {world}: all the same; bytes sent by rank 0: {sent}")
dist.destroy_process_group()
