"""Tensor parallelism with sequence parallelism: weights, and the rows between them, split over the axis "tp".

This is Megatron's scheme in torch's parallel styles. Column-parallel matrices give each rank some of the heads, or some
of the feed-forward width; the row-parallel matrix behind them needs a sum over ranks. Between such pairs, where norms
work row by row, each rank holds some of the rows (sequence parallelism): the sum is a reduce-scatter, and an all-gather
restores the rows. The vocabulary is split as well: each rank embeds its own tokens and computes its own logits.

    embed ─┬─ norm ── gather ── wq wk wv ── attention ── wo ── scatter ─┬─ ... ── norm ── gather ── head
    rows   │ rows              heads        heads             rows      │         rows             vocabulary

Attention sees all rows of some heads, so context parallelism over "ring" and "ulysses" is independent of this module.

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


def check_tp(config: DecoderConfig, mesh: DeviceMesh) -> None:
    """Checks that the size of "tp" divides every dimension that it splits.

    Raises:
        ArgumentError: naming every dimension that does not divide.
    """
    tp = axis_size(mesh, "tp")
    dims = {
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "hidden": config.hidden,
        "vocab_size": config.vocab_size,
    }
    if wrong := [f"{name}={size}" for name, size in dims.items() if size % tp]:
        hint = " (kv heads are not replicated over tp: use a smaller tp)" if config.num_kv_heads < tp else ""
        raise ArgumentError(f"tp={tp}: must divide {', '.join(wrong)}{hint}")


def apply_tp(model: Decoder, mesh: DeviceMesh) -> None:
    """Splits the weights of a decoder, or of one of its stages, over the axis "tp", in place. Without "tp", a no-op.

    Weights become DTensors on that axis, with the values of its rank 0. The stage then takes and returns the residual
    stream as (B, S / tp, dim), where S is the number of rows of this context rank, and returns logits as
    (B, S, vocab_size / tp). The feed-forward module of a mixture-of-experts layer is not changed; it receives
    (B, S / tp, dim).

    Args:
        model: a decoder that passes `check_tp`.
        mesh: from `build_mesh`.
    Communication: each weight once.
    """
    tp_mesh = axis_mesh(mesh, "tp")
    if tp_mesh is None:
        return
    seq_shard, replicated = Shard(1), Replicate()
    plan: dict[str, ParallelStyle] = {}
    if model.embed is not None:
        plan["embed"] = RowwiseParallel(input_layouts=replicated, output_layouts=seq_shard)
    for name, layer in model.layers.items():
        plan |= {
            f"layers.{name}.attention_norm": SequenceParallel(),
            f"layers.{name}.attention": PrepareModuleInput(input_layouts=seq_shard, desired_input_layouts=replicated),
            f"layers.{name}.attention.wq": ColwiseParallel(),
            f"layers.{name}.attention.wk": ColwiseParallel(),
            f"layers.{name}.attention.wv": ColwiseParallel(),
            f"layers.{name}.attention.wo": RowwiseParallel(output_layouts=seq_shard),
            f"layers.{name}.feed_forward_norm": SequenceParallel(use_local_output=True),
        }
        if isinstance(layer.feed_forward, FeedForward):
            plan |= {
                f"layers.{name}.feed_forward": PrepareModuleInput(
                    input_layouts=seq_shard, desired_input_layouts=replicated
                ),
                f"layers.{name}.feed_forward.gate": ColwiseParallel(),
                f"layers.{name}.feed_forward.up": ColwiseParallel(),
                f"layers.{name}.feed_forward.down": RowwiseParallel(output_layouts=seq_shard),
            }
    if model.norm is not None:
        plan["norm"] = SequenceParallel()
    if model.head is not None:
        plan["head"] = ColwiseParallel(input_layouts=seq_shard)
    parallelize_module(model, tp_mesh, plan)
