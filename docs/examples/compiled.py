"""A compiled module attends without a graph break, and gives what it gives uncompiled."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringattn import Layout, Mask, causal, ring_attention, shard, zigzag

dist.init_process_group("gloo")
torch.manual_seed(0)


class SelfAttention(nn.Module):
    """Attention with projections before and after it."""

    def __init__(self, dim: int, num_heads: int, mask: Mask, layout: Layout) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.num_heads, self.mask, self.layout = num_heads, mask, layout

    def forward(self, x: Tensor) -> Tensor:
        """Attends to all ranks' rows."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return self.out(ring_attention(q, k, v, mask=self.mask, layout=self.layout).flatten(2))


layout = zigzag(200, dist.get_world_size())
module = SelfAttention(64, 4, causal(), layout)
# Inductor, the default backend, makes code of what is around the attention. This one makes none, and starts at once.
compiled = torch.compile(module, fullgraph=True, backend="aot_eager")

x = shard(torch.randn(2, 200, 64), layout)
torch.testing.assert_close(compiled(x), module(x))
(wanted,) = torch.autograd.grad(module(x).square().sum(), module.qkv.weight)
(found,) = torch.autograd.grad(compiled(x).square().sum(), module.qkv.weight)
torch.testing.assert_close(found, wanted)
dist.destroy_process_group()
