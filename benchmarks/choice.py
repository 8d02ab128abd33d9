"""Packed batches: what "auto" chooses, beside each exchange chosen by hand, and a zigzag ring that ignores documents.

    torchrun --nproc-per-node=4 -m benchmarks.choice --out results/choice

Documents of 128 to 8,192 tokens with a long tail fill the sequence. The ring that ignores them attends causally to
everything before, in a zigzag layout: what many packed batches are still put through. All others attend within
documents, in a layout that makes their work even. With --measure the cost model is
measured first, else it is the constants. The last table holds two ratios against what is to be reached: "auto" at least
twice as fast as that ring, and within 10 % of the best exchange chosen by hand.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

import ringattn
from benchmarks.measure import Contender, Lines, progress, race, ratio
from benchmarks.session import Session, session
from ringattn.attention.calibration import default_model
from ringattn.cost.select_exchange import predict

IGNORING, AUTO = "zigzag ring, documents ignored", "auto"
FASTER, LONGER = 2.0, 1.1  # what is to be reached
BY_HAND: dict[str, dict[str, object]] = {
    "ring": {"exchange": "ring"},
    "gather": {"exchange": "gather", "stages": 1},
    "gather in 4 stages": {"exchange": "gather", "stages": 4},
    "ulysses": {"exchange": "ulysses", "stages": 1},
    "ulysses in 2 stages": {"exchange": "ulysses", "stages": 2},
}


def document_ends(seq_len: int, shortest: int, longest: int, seed: int) -> list[int]:
    """Returns cumulative lengths of documents with a long tail, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    tail = torch.empty(seq_len // shortest + 1).exponential_(0.8, generator=generator)
    ends = (shortest * tail.exp()).clamp(max=longest).long().cumsum(0)
    return [0, *ends[ends < seq_len].tolist(), seq_len]


def model_of(here: Session, dtype: torch.dtype, head_dim: int, measured: bool) -> ringattn.CostModel:
    """Returns the cost model: measured, or the constants."""
    if not measured:
        return default_model(here.device.type)
    link = ringattn.measure_link(device=here.device)
    return ringattn.CostModel(link, ringattn.measure_compute(dtype=dtype, head_dim=head_dim, device=here.device))


def main() -> None:
    """Measures by flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=32768)
    parser.add_argument("--shortest", type=int, default=128)
    parser.add_argument("--longest", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/choice"))
    args = parser.parse_args()
    with session() as here:
        dtype = getattr(torch, args.dtype)
        model = model_of(here, dtype, args.head_dim, args.measure)
        lines = Lines(args.out / "choice.jsonl") if here.rank == 0 else None
        table = Table("batch", "exchange", "seconds", "predicted", "× ignoring", title="packed batches, fwd+bwd")
        goals = Table(
            "batch", "× ignoring", "goal", "× best by hand", "goal ", title="auto: times faster, times as long"
        )
        for seed in args.seeds:
            _batch(args, seed, dtype, model, here, lines, table, goals)
        if lines is not None:
            Console(width=110).print(table, goals)
        dist.barrier()


def _batch(
    args: argparse.Namespace,
    seed: int,
    dtype: torch.dtype,
    model: ringattn.CostModel,
    here: Session,
    lines: Lines | None,
    table: Table,
    goals: Table,
) -> None:
    """Measures one batch, and adds its rows."""
    ends = document_ends(args.seq_len, args.shortest, args.longest, seed)
    packed = ringattn.documents(ends) & ringattn.causal()
    even = ringattn.balanced(packed, args.seq_len, here.world_size)
    zigzag = ringattn.zigzag(args.seq_len, here.world_size)

    def local(layout: ringattn.Layout) -> list[Tensor]:
        rows = layout.num_tokens(here.rank)
        shapes = [(1, rows, heads, args.head_dim) for heads in (args.heads, args.kv_heads, args.kv_heads)]
        return [torch.randn(shape, device=here.device).to(dtype).requires_grad_() for shape in shapes]

    def once(tensors: list[Tensor], asked: dict[str, object]) -> object:
        out = ringattn.context_parallel_attention(*tensors, **asked)  # type: ignore[arg-type]
        return torch.autograd.grad(out.sum(), tensors)

    ignoring: dict[str, object] = {"exchange": "ring", "mask": ringattn.causal(), "layout": zigzag, "model": model}
    within: dict[str, object] = {"mask": packed, "layout": even, "model": model}
    tensors = local(even)
    found = [Contender(IGNORING, partial(once, local(zigzag), ignoring), 1)]
    found += [Contender(name, partial(once, tensors, {**within, **asked}), 1) for name, asked in BY_HAND.items()]
    found.append(Contender(AUTO, partial(once, tensors, within), 1))
    q, k, v = tensors
    choice = ringattn.explain(q, k, v, model=model, mask=packed, layout=even)
    setting = choice.setting
    applicable = [replace(c, prediction=None) for c in choice.candidates if c.prediction]
    predicted = {str(c): predict(c, setting, model).total_s for c in applicable}
    predicted[AUTO] = predicted[named(choice)]
    with progress(f"batch {seed}", len(found) * (args.rounds + args.warmup), here.rank == 0) as tick:
        seconds = race(found, args.rounds, args.warmup, tick)
    if lines is None:
        return
    print(choice)
    base = {"seed": seed, "documents": len(ends) - 1, "ranks": here.world_size, "model": str(model)}
    for contender in found:
        median = statistics.median(seconds[contender.name])
        faster = ratio(seconds, IGNORING, contender.name)
        expected = predicted.get(contender.name)
        name = f"auto: {choice.chosen}" if contender.name == AUTO else contender.name
        record = {**base, "exchange": contender.name, "chosen": named(choice), "median_s": median}
        lines.add({**record, "times_ignoring": faster, "predicted_s": expected, "rounds_s": seconds[contender.name]})
        table.add_row(str(seed), name, f"{median:.3f}", f"{expected:.3f}" if expected else "", f"{faster:.2f}")
    best = min(BY_HAND, key=lambda name: statistics.median(seconds[name]))
    faster, longer = ratio(seconds, IGNORING, AUTO), ratio(seconds, AUTO, best)
    lines.add({**base, "chosen": named(choice), "auto_times_ignoring": faster, "best": best, "auto_over_best": longer})
    goals.add_row(str(seed), f"{faster:.2f}", f"≥ {FASTER:g}", f"{longer:.3f} ({best})", f"≤ {LONGER:g}")


def named(choice: ringattn.Choice) -> str:
    """Returns what was chosen, as in BY_HAND."""
    assert choice.chosen is not None
    return str(choice.chosen)


if __name__ == "__main__":
    main()
