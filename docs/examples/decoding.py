"""A prompt, decoding, and a speculation that is taken back, on a cache that is spread over all ranks."""

import torch
import torch.distributed as dist

from ringattn import DistributedKVCache, decode_attention, prefill_attention, zigzag

dist.init_process_group("gloo")  # "nccl" on GPUs
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
k, v = torch.randn(2, 1, 104, 2, 16)  # (batch, positions, kv heads, head_dim): what one process would hold
q = torch.randn(1, 104, 8, 16)

cache = DistributedKVCache(num_layers=1, num_kv_heads=2, head_dim=16, num_pages=64, page_size=16, dtype=torch.float32)
sequence = cache.new()

prompt = zigzag(100, world)  # the prompt's keys stay with the rank that computed them
new = cache.extend([sequence], prompt)
mine = prompt.positions(rank)
prefill_attention(q[:, mine], k[:, mine], v[:, mine], cache, 0, new)

new = cache.extend([sequence], 4)  # four tokens at once, which every rank computes
out = decode_attention(q[:, 100:], k[:, 100:], v[:, 100:], cache, 0, new)

allowed = torch.arange(104) <= torch.arange(100, 104)[:, None]
whole = (x.transpose(1, 2) for x in (q[:, 100:], k, v))
expected = torch.nn.functional.scaled_dot_product_attention(*whole, attn_mask=allowed, enable_gqa=True)
torch.testing.assert_close(out, expected.transpose(1, 2))

cache.truncate(sequence, 102)  # two of the four were refused
other = cache.fork(sequence)  # shares its pages
assert cache.length(other) == 102
print(f"rank {rank} of {world}: {cache.num_free_pages} pages are free")
dist.destroy_process_group()
