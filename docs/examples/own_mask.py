"""A mask of one's own: every query sees its own position and some before it, at fixed distances."""

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange

from ringattn import Mask, gather_attention, shard, striped, unshard
from ringattn.geometry.masks import MaskTerm, register_mask, slice_table


def distance_slices(q_len: int, k_len: int, *distances: int) -> np.ndarray:
    """One slice for each distance: all queries, all keys, k - q = -distance."""
    return slice_table(*[(0, q_len, 0, k_len, -d, -d) for d in distances])


@register_mask(distance_slices)
def distances(*distances: int) -> Mask:
    """A query at q sees the keys at q - d, for each distance d."""
    return Mask((MaskTerm("distances", tuple(sorted(set(distances)))),))


dist.init_process_group("gloo")
torch.manual_seed(0)
length = 101
q, k, v = torch.randn(3, 1, length, 4, 16)

mask = distances(0, 1, 2, 4, 8, 16, 32, 64)
layout = striped(length, dist.get_world_size())
local = [shard(x, layout) for x in (q, k, v)]
out = unshard(gather_attention(*local, mask=mask, layout=layout), layout)

distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
allowed = torch.isin(distance, torch.tensor([0, 1, 2, 4, 8, 16, 32, 64]))
q, k, v = (rearrange(x, "batch seq head dim -> batch head seq dim") for x in (q, k, v))
expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
torch.testing.assert_close(out, rearrange(expected, "batch head seq dim -> batch seq head dim"))
dist.destroy_process_group()
