"""Generate with a KV cache that is distributed over all ranks, and continue the conversation."""

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import ringattn.hf as rhf

dist.init_process_group("gloo")  # "nccl" on GPUs
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)  # the same weights on every rank; usually from_pretrained
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, eos_token_id=None,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()
prompt, question = torch.randint(64, (1, 200)), torch.randint(64, (1, 30))  # the whole prompt, on every rank
expected = model.generate(prompt, max_new_tokens=8, do_sample=False)  # the reference: one process

with rhf.patch(model) as handle:
    cache = rhf.RingCache(handle, num_pages=32, page_size=16)
    answer = model.generate(prompt, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert torch.equal(answer, expected)

    longer = torch.cat([answer, question], 1)  # only the new tokens are computed
    answer = model.generate(longer, past_key_values=cache, max_new_tokens=8, do_sample=False)
    print(f"rank {rank} of {world}: {cache}, of {cache.store.num_free_pages} pages free")
    cache.reset()
dist.destroy_process_group()
