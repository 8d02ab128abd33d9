"""Training on a mesh of axes, here of one alone, has the losses of one process."""

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

from ringattn import causal, zigzag
from ringattn.parallel.context_parallel import local_batch, make_cp_attention
from ringattn.parallel.decoder import Decoder, DecoderConfig
from ringattn.parallel.grad_norm import clip_gradients
from ringattn.parallel.mesh import build_mesh, context_mesh, describe
from ringattn.parallel.parallelize_decoder import parallelize
from ringattn.parallel.vocab_parallel_loss import count_valid, cross_entropy, sum_over_token_ranks

CONFIG = DecoderConfig(vocab_size=32, num_layers=2, dim=16, num_heads=4, num_kv_heads=2, hidden=24)

dist.init_process_group("gloo")
torch.manual_seed(0)
tokens = torch.randint(32, (2, 61))
batch = {"input_ids": tokens, "labels": tokens, "mask": causal()}
single = Decoder(CONFIG).double()
model = Decoder(CONFIG).double()
model.load_state_dict(single.state_dict())  # the same weights everywhere

# On 16 ranks this could be build_mesh(dp_shard=2, ring=2, ulysses=2, tp=2), and nothing else would change.
mesh = build_mesh(ring=dist.get_world_size())
if dist.get_rank() == 0:
    print(describe(mesh))
model = parallelize(model, mesh, zero=3)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # made after it: parameters are sharded now
layout = zigzag(61, context_mesh(mesh).size())
attend = make_cp_attention(mesh, layout)
share = local_batch(batch, mesh, layout)
num_valid = count_valid(share["shift_labels"], mesh)  # on all ranks

losses = []
for _ in range(3):
    logits = model(share["input_ids"], positions=share["position_ids"], mask=share["mask"], attend=attend)
    loss = cross_entropy(logits, share["shift_labels"], num_valid, mesh)  # this rank's share
    optimizer.zero_grad()
    loss.backward()
    clip_gradients(model.parameters(), mesh, max_norm=0.1)
    optimizer.step()
    losses.append(sum_over_token_ranks(loss, mesh))


# One process.
def attend_alone(q, k, v, mask):  # noqa: ANN001, ANN201
    """The same attention, by torch."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


expected = []
optimizer = torch.optim.AdamW(single.parameters(), lr=1e-2)
for _ in range(3):
    logits = single(tokens, positions=torch.arange(61)[None], mask=None, attend=attend_alone)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(single.parameters(), 0.1)
    optimizer.step()
    expected.append(loss.detach())

torch.testing.assert_close(torch.stack(losses), torch.stack(expected))
dist.destroy_process_group()
