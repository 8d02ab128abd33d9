"""Tensor parallelism: each weight split over the axis "tp", and the rows between them, too.

Megatron's scheme, in torch's own styles. Where a matrix is split by columns, each rank computes some heads, or some of
the feed-forward's width; the matrix behind it is split by rows, and the ranks' results are summed. Between such pairs,
where norms work row by row, each rank keeps some of the rows (sequence parallelism): the sum is a reduce-scatter, and
an all-gather brings the rows back. The vocabulary is split, too: a rank looks up its own tokens, and computes its own
logits.

    embed ─┬─ norm ── gather ── wq wk wv ── attention ── wo ── scatter ─┬─ ... ── norm ── gather ── head
    rows   │ rows              heads        heads             rows      │         rows             vocabulary

So attention sees all rows of some heads, and whatever is done over ring and ulysses is none of this file's business.

Source: Shoeybi et al. 2019, arXiv:1909.08053; Korthikanti et al. 2022, arXiv:2205.05198.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from ringattn.errors import ArgumentError
from ringattn.parallel.decoder import Decoder, DecoderConfig, FeedForward
from ringattn.parallel.mesh import axis_mesh, axis_size


def check_tensor(config: DecoderConfig, mesh: DeviceMesh) -> None:
    """Checks that everything that is split divides by the axis "tp".

    Raises:
        ArgumentError: when it does not; with every reason.
    """
    size = axis_size(mesh, "tp")
    counts = {
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "hidden": config.hidden,
        "vocab_size": config.vocab_size,
    }
    if wrong := [f"{name}={count}" for name, count in counts.items() if count % size]:
        few = " (kv heads are not replicated over tp: take a smaller one)" if config.num_kv_heads < size else ""
        raise ArgumentError(f"tp={size}: must divide {', '.join(wrong)}{few}")


def apply_tp(model: Decoder, mesh: DeviceMesh) -> None:
    """Splits a decoder's weights over the axis "tp", if there is one; a stage's, where it is a stage.

    Weights become DTensors on that axis, rank 0 of it giving its values to the others. Then the stage takes and gives
    the residual stream as (B, S / tp, dim), S being the rows that this rank's "tp" neighbours have together, and gives
    logits as (B, S, vocab_size / tp). What stands in the feed-forward slot of a mixture-of-experts layer is left as
    it is, and gets (B, S / tp, dim).

    Communication: each weight once.
    """
    along = axis_mesh(mesh, "tp")
    if along is None:
        return
    rows, whole = Shard(1), Replicate()
    plan: dict[str, ParallelStyle] = {}
    if model.embed is not None:
        plan["embed"] = RowwiseParallel(input_layouts=whole, output_layouts=rows)
    for name, layer in model.layers.items():
        plan |= {
            f"layers.{name}.attention_norm": SequenceParallel(),
            f"layers.{name}.attention": PrepareModuleInput(input_layouts=rows, desired_input_layouts=whole),
            f"layers.{name}.attention.wq": ColwiseParallel(),
            f"layers.{name}.attention.wk": ColwiseParallel(),
            f"layers.{name}.attention.wv": ColwiseParallel(),
            f"layers.{name}.attention.wo": RowwiseParallel(output_layouts=rows),
            f"layers.{name}.feed_forward_norm": SequenceParallel(use_local_output=True),
        }
        if isinstance(layer.feed_forward, FeedForward):
            plan |= {
                f"layers.{name}.feed_forward": PrepareModuleInput(input_layouts=rows, desired_input_layouts=whole),
                f"layers.{name}.feed_forward.gate": ColwiseParallel(),
                f"layers.{name}.feed_forward.up": ColwiseParallel(),
                f"layers.{name}.feed_forward.down": RowwiseParallel(output_layouts=rows),
            }
    if model.norm is not None:
        plan["norm"] = SequenceParallel()
    if model.head is not None:
        plan["head"] = ColwiseParallel(input_layouts=rows)
    parallelize_module(model, along, plan)
