"""Speed and accuracy of causal ring attention, and the cost of structured masks.

Contenders of `attention`: torch's attention in one process with a thread for each rank; ringattn in one process with as
many threads, which shows the kernel alone; ringattn over all ranks with one thread each; and ring-flash-attn, if it is
installed, over torch's kernel and over ours. Ratios above 1 are faster than torch in one process.

`accuracy` splits the ranks into groups of 1, 2, 4, ... ranks and solves the same problem on each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import ringattn
from benchmarks import plots
from benchmarks.inputs import LAYOUTS, Shape, packed_documents, with_gradients
from benchmarks.internals import mask_area
from benchmarks.registry import benchmark
from benchmarks.ring_flash_attn_cpu import zigzag_ring_flash_attention
from benchmarks.runner import Contender, Session

TORCH, OWN, RING, PEER = "torch, one process", "ringattn, one process", "ringattn, ring", "ring-flash-attn"
PEER_OWN = f"{PEER}, our kernel"
PASSES = {False: "fwd", True: "fwd+bwd"}

# Each mask with the layout that suits it.
MASKS: dict[str, tuple[Callable[[int], ringattn.Mask], str]] = {
    "causal": (lambda n: ringattn.causal(), "zigzag"),
    "window of 1,024": (lambda n: ringattn.sliding_window(1023), "contiguous"),
    "window of 4,096": (lambda n: ringattn.sliding_window(4095), "contiguous"),
    "packed documents": (packed_documents, "balanced"),
    "chunks of 2,048": (lambda n: ringattn.chunked(2048) & ringattn.causal(), "zigzag"),
}


def _torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _contenders(
    whole: tuple[Tensor, ...], backward: bool, alone: dist.ProcessGroup | None, ranks: int
) -> tuple[list[Contender], str]:
    """Returns the contenders on this rank, and why ring-flash-attn is missing, if it is."""
    layout, mask = ringattn.zigzag(whole[0].shape[1], ranks), ringattn.causal()
    shards = tuple(ringattn.shard(x, layout) for x in whole)
    one_process = {TORCH: _torch_attention, OWN: lambda q, k, v: ringattn.ring_attention(q, k, v, alone, mask=mask)}
    local = {RING: lambda q, k, v: ringattn.ring_attention(q, k, v, mask=mask, layout=layout)}
    missing = ""
    for name, backend in ((PEER, "sdpa"), (PEER_OWN, "native")):
        peer = zigzag_ring_flash_attention(None, backend)
        if isinstance(peer, str):
            missing = peer
        elif whole[0].shape[2] != whole[1].shape[2]:
            missing = "its CPU kernels have no GQA"
        else:
            local[name] = peer
    found = [
        Contender(name, with_gradients(attention, whole, backward) if alone else None, ranks)
        for name, attention in one_process.items()
    ]
    found += [Contender(name, with_gradients(attention, shards, backward)) for name, attention in local.items()]
    return found, missing


@benchmark("attention", help="causal ring attention beside one process and ring-flash-attn", ranks=2)
def attention(
    here: Session,
    lengths: Sequence[int] = (4096, 8192, 16384),
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    heads: int = 8,
    kv_heads: int = 8,
    head_dim: int = 64,
    rounds: int = 7,
    warmup: int = 2,
) -> None:
    """Measures every length, dtype and pass."""
    records, group, missing = here.records("attention"), dist.new_group([0]), ""
    for seq_len, dtype, backward in product(lengths, dtypes, (False, True)):
        shape = Shape(heads, kv_heads, head_dim, dtype)
        whole = shape.random(seq_len, here.device)
        contenders, missing = _contenders(whole, backward, group if here.is_main else None, here.world_size)
        seconds = here.time(f"{seq_len:>6} {dtype:<8} {PASSES[backward]}", contenders, rounds, warmup)
        case = {"seq_len": seq_len, "pass": PASSES[backward], "ranks": here.world_size}
        for name in seconds:
            ratio = {"contender": name, "times_torch": seconds.ratio(TORCH, name)}
            records.add(vars(shape), case, ratio, seconds.summary(name))
    records.show("causal attention", "seq_len dtype pass contender median_s times_torch")
    if here.is_main:
        plots.speed(records, here.out / "speed.png")
    if missing:
        here.print(f"{PEER} did not run: {missing}")


@benchmark("masks", help="the time of structured masks beside causal attention and their share of its area", ranks=2)
def masks(here: Session, seq_len: int = 32768, dtype: str = "float32", rounds: int = 3, warmup: int = 1) -> None:
    """Measures every mask in the layout that suits it; `ideal` is the ratio of the areas."""
    records = here.records("masks")
    for backward in (False, True):
        contenders, area = [], {}
        for name, (mask_of, layout_name) in MASKS.items():
            mask = mask_of(seq_len)
            layout = LAYOUTS[layout_name](mask, seq_len, here.world_size)
            tensors = Shape(8, 8, 64, dtype).random(layout.num_tokens(here.rank), here.device)
            ring = partial(ringattn.ring_attention, mask=mask, layout=layout)
            contenders.append(Contender(name, with_gradients(ring, tensors, backward)))
            area[name] = mask_area(mask, layout)
        seconds = here.time(PASSES[backward], contenders, rounds, warmup)
        for name in seconds:
            faster, ideal = seconds.ratio("causal", name), area["causal"] / area[name]
            case = {"mask": name, "pass": PASSES[backward], "seq_len": seq_len, "ranks": here.world_size}
            ratios = {"times_causal": faster, "ideal": ideal, "of_ideal": faster / ideal}
            records.add(case, seconds.summary(name), ratios)
    records.show("the cost of masks", "mask pass median_s times_causal ideal of_ideal")


def _solve(whole: Sequence[Tensor], dtype: torch.dtype, group: dist.ProcessGroup) -> list[Tensor]:
    """Returns out, dq, dk, dv of the whole sequence, computed by the ranks of a group in `dtype`."""
    layout = ringattn.zigzag(whole[0].shape[1], group.size())
    q, k, v, dout = (ringattn.shard(x, layout, group).to(dtype) for x in whole)
    for x in (q, k, v):
        x.requires_grad_()
    out = ringattn.ring_attention(q, k, v, group, mask=ringattn.causal(), layout=layout)
    found = [out.detach(), *torch.autograd.grad(out, [q, k, v], dout)]
    return [ringattn.unshard(x, layout, group).double() for x in found]


@benchmark("accuracy", help="the error of single and half precision against float64, by number of ranks", ranks=8)
def accuracy(here: Session, seq_len: int = 2048) -> None:
    """Compares each dtype with float64: root mean square error over root mean square value."""
    records, inputs = here.records("accuracy"), Shape(4, 4, 64, "float64").random(seq_len, here.device)
    groups = {n: dist.new_group(list(range(n))) for n in (1, 2, 4, 8, 16) if n <= here.world_size}
    for dtype, (ranks, group) in product((torch.float32, torch.bfloat16, torch.float16), groups.items()):
        if here.rank < ranks:
            # Inputs are rounded first, so that only the error of the computation is measured.
            whole = [x.to(dtype).double() for x in inputs]
            pairs = zip(("out", "dq", "dk", "dv"), _solve(whole, dtype, group), _solve(whole, torch.float64, group))
            errors = {name: float((a - b).norm() / b.norm()) for name, a, b in pairs}
            records.add({"dtype": str(dtype), "ranks": ranks}, errors)
        dist.barrier()
    records.show("root mean square error over root mean square value", "dtype ranks out dq dk dv")
