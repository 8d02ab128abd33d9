"""A transformers model over the ranks of a group: the same loss and logits as in one process."""

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import ringattn.hf as rhf

dist.init_process_group("gloo")
torch.manual_seed(0)  # the same weights and batch on every rank
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)

ids = torch.randint(64, (2, 101))  # any length works with any number of ranks
batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
batch["attention_mask"][1, 80:] = 0  # padding
batch["labels"] = ids.masked_fill(batch["attention_mask"] == 0, -100)
expected = model(**batch)

with rhf.patch(model) as handle:
    local_batch = handle.shard(batch)  # this rank's tokens, positions and labels
    output = model(**local_batch)
    output.loss.backward()  # this rank's part of the loss: gradients are summed over the ranks
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    torch.testing.assert_close(handle.reduce(output.loss), expected.loss)
    logits = handle.unshard(output.logits, local_batch)
    torch.testing.assert_close(logits[0], expected.logits[0], atol=1e-5, rtol=1e-4)

print(f"rank {dist.get_rank()} of {dist.get_world_size()}: equal to one process")
dist.destroy_process_group()
