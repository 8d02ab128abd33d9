"""One training step over sharded sequences has the loss and the gradients of one process."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from ringattn import causal, ring_attention, shard_batch, zigzag


class Model(nn.Module):
    """One attention layer between an embedding and an output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding, self.position_embedding = nn.Embedding(32, 16), nn.Embedding(64, 16)
        self.qkv, self.head = nn.Linear(16, 48), nn.Linear(16, 32)

    def forward(self, input_ids: Tensor, position_ids: Tensor, layout=None) -> Tensor:  # noqa: ANN001
        """Returns logits for the given rows: the whole sequence, or this rank's rows with a layout."""
        x = self.token_embedding(input_ids) + self.position_embedding(position_ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(-3)
        if layout is not None:
            y = ring_attention(q, k, v, mask=causal(), layout=layout)
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            y = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.head(x + y.flatten(-2))


dist.init_process_group("gloo")
torch.manual_seed(0)
model = Model().double()  # the same parameters on every rank
batch = {"input_ids": torch.randint(32, (2, 61))}
batch["labels"] = batch["input_ids"].clone()
batch["labels"][0, :20] = -100  # positions without a target

# Sharded: shard_batch shifts the labels first, then shards them.
layout = zigzag(61, dist.get_world_size())
local = shard_batch(batch, layout)
logits = model(local["input_ids"], local["position_ids"], layout)
targets = local["shift_labels"]

num_valid = (targets != -100).sum()
dist.all_reduce(num_valid)  # over all ranks
loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum") / num_valid
loss.backward()
for parameter in model.parameters():
    dist.all_reduce(parameter.grad)  # a sum, not a mean: each rank has its share of the gradient
total = loss.detach().clone()
dist.all_reduce(total)

# One process.
single = Model().double()
single.load_state_dict(model.state_dict())
logits = single(batch["input_ids"], torch.arange(61)[None])
expected = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
expected.backward()

torch.testing.assert_close(total, expected.detach())
for sharded, whole in zip(model.parameters(), single.parameters(), strict=True):
    torch.testing.assert_close(sharded.grad, whole.grad)
dist.destroy_process_group()
