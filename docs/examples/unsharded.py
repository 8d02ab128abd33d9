"""What is computed from `unshard` counts as the computation of one process."""

import torch
import torch.distributed as dist

from ringattn import causal, ring_attention, shard, unshard, zigzag

dist.init_process_group("gloo")
torch.manual_seed(0)
x = torch.randn(1, 31, 2, 8, dtype=torch.float64)
before = torch.randn(8, dtype=torch.float64, requires_grad=True)  # used on this rank's rows
after = torch.randn(8, dtype=torch.float64, requires_grad=True)  # used on the whole, alike on every rank

layout = zigzag(31, dist.get_world_size())
local = shard(x, layout) * before
out = unshard(ring_attention(local, local, local, mask=causal(), layout=layout), layout)
loss = (out * after).square().sum()  # the same number on every rank
loss.backward()
dist.all_reduce(before.grad)  # each rank had its share
# `after.grad` is whole already: not to be summed.

whole = [t.detach().clone().requires_grad_() for t in (before, after)]
q = (x * whole[0]).transpose(1, 2)
expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2)
(expected * whole[1]).square().sum().backward()
torch.testing.assert_close(before.grad, whole[0].grad)
torch.testing.assert_close(after.grad, whole[1].grad)
dist.destroy_process_group()
