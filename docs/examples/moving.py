"""A cache that forgets its middle, goes to files and back, and moves to fewer ranks while it lives."""

import tempfile

import torch
import torch.distributed as dist

from ringattn import DistributedKVCache, decode_attention, load_cache, reshard, save_cache

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
k, v = torch.randn(2, 1, 60, 2, 16)
q = torch.randn(1, 60, 8, 16)

cache = DistributedKVCache(num_layers=1, num_kv_heads=2, head_dim=16, num_pages=32, page_size=4, dtype=torch.float32)
sequence = cache.new()
cache.write(0, cache.extend([sequence], 59), k[:, :59], v[:, :59])
cache.evict(sequence, sinks=4, window=20)  # positions 4 to 38 are gone; the others keep theirs
kept = [*range(4), *range(39, 60)]
whole = (x.transpose(1, 2) for x in (q[:, 59:], k[:, kept], v[:, kept]))
expected = torch.nn.functional.scaled_dot_product_attention(*whole, enable_gqa=True).transpose(1, 2)

folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)  # one folder, which all ranks reach
save_cache(cache, folder[0])
loaded = load_cache(folder[0], num_pages=32)  # on these ranks, or on any other number of them

first = dist.new_group([0])
alone = reshard(loaded, num_pages=64, group=first)  # rank 0 takes all of it
for each in (loaded, alone):
    if each is not None:
        out = decode_attention(q[:, 59:], k[:, 59:], v[:, 59:], each, 0, each.extend([sequence], 1))
        torch.testing.assert_close(out, expected)
assert (alone is None) == (rank > 0)
print(f"rank {rank}: {cache.num_free_pages} pages are free in the first cache")
dist.destroy_process_group()
