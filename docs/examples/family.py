"""Training on a mesh, here with one axis, has the losses of one process."""

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

from ringattn import causal, zigzag
from ringattn.parallel import (
    Decoder,
    DecoderConfig,
    all_reduce_loss,
    build_mesh,
    clip_gradients,
    context_mesh,
    count_valid,
    cross_entropy,
    describe_mesh,
    local_batch,
    make_cp_attention,
    parallelize,
)

CONFIG = DecoderConfig(vocab_size=32, num_layers=2, dim=16, num_heads=4, num_kv_heads=2, hidden=24)

dist.init_process_group("gloo")
torch.manual_seed(0)
tokens = torch.randint(32, (2, 61))
batch = {"input_ids": tokens, "labels": tokens, "mask": causal()}
single = Decoder(CONFIG).double()
model = Decoder(CONFIG).double()
model.load_state_dict(single.state_dict())  # the same weights on every rank

# On 16 ranks: build_mesh(dp_shard=2, ring=2, ulysses=2, tp=2). Nothing else changes.
mesh = build_mesh(ring=dist.get_world_size())
if dist.get_rank() == 0:
    print(describe_mesh(mesh))
model = parallelize(model, mesh, zero=3)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # created after it: parameters are DTensors now
layout = zigzag(61, context_mesh(mesh).size())
attention = make_cp_attention(mesh, layout)
part = local_batch(batch, mesh, layout)
num_valid = count_valid(part["shift_labels"], mesh)  # on all ranks

losses = []
for _ in range(3):
    logits = model(part["input_ids"], positions=part["position_ids"], mask=part["mask"], attention_fn=attention)
    loss = cross_entropy(logits, part["shift_labels"], num_valid, mesh)  # this rank's share of the sum
    optimizer.zero_grad()
    loss.backward()
    clip_gradients(model.parameters(), mesh, max_norm=0.1)
    optimizer.step()
    losses.append(all_reduce_loss(loss, mesh))


# One process.
def dense_attention(q, k, v, mask):  # noqa: ANN001, ANN201
    """Causal attention by torch."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


expected = []
optimizer = torch.optim.AdamW(single.parameters(), lr=1e-2)
for _ in range(3):
    logits = single(tokens, positions=torch.arange(61)[None], mask=None, attention_fn=dense_attention)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(single.parameters(), 0.1)
    optimizer.step()
    expected.append(loss.detach())

torch.testing.assert_close(torch.stack(losses), torch.stack(expected))
dist.destroy_process_group()
