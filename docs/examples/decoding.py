"""Prefill, decoding, rejected speculative tokens and a fork, on a cache that is distributed over all ranks."""

import torch
import torch.distributed as dist

from ringattn import DistributedKVCache, decode_attention, prefill_attention, zigzag

dist.init_process_group("gloo")  # "nccl" on GPUs
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
# What a single process would hold: a prompt of 100 tokens, and 4 new ones.
k, v = torch.randn(2, 1, 104, 2, 16)  # (batch, tokens, kv heads, head_dim)
q = torch.randn(1, 104, 8, 16)

cache = DistributedKVCache(num_layers=1, num_kv_heads=2, head_dim=16, num_pages=64, page_size=16, dtype=torch.float32)
sequence = cache.new()

# Prefill: each rank computes its tokens of the layout, and stores their keys and values.
prompt = zigzag(100, world)
extension = cache.extend([sequence], prompt)
own = prompt.positions(rank)
prefill_attention(q[:, own], k[:, own], v[:, own], cache, 0, extension)

# Decoding: every rank computes all 4 new tokens; each token is stored on one rank.
extension = cache.extend([sequence], 4)
out = decode_attention(q[:, 100:], k[:, 100:], v[:, 100:], cache, 0, extension)

allowed = torch.arange(104) <= torch.arange(100, 104)[:, None]
whole = (x.transpose(1, 2) for x in (q[:, 100:], k, v))
expected = torch.nn.functional.scaled_dot_product_attention(*whole, attn_mask=allowed, enable_gqa=True)
torch.testing.assert_close(out, expected.transpose(1, 2))

cache.truncate(sequence, 102)  # two of the four tokens were rejected
fork = cache.fork(sequence)  # shares all pages
assert cache.length(fork) == 102
print(f"rank {rank} of {world}: {cache.num_free_pages} pages are free")
dist.destroy_process_group()
