"""Packed batches: exchange="auto" beside each exchange chosen by hand, and beside a zigzag ring without document masks.

Documents of 128 to 8,192 tokens with a long tail fill the sequence. The ring without document masks attends causally to
all tokens before, in a zigzag layout, which is still common for packed batches. All other contenders attend within
documents, in a balanced layout. With --measure the cost model is measured first; without it, it consists of constants.
The second table compares "auto" with two goals: at least twice as fast as that ring, and within 10 % of the best
exchange chosen by hand.

`regret` runs random calls by every exchange, and reports how much longer the selected one takes than the fastest.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ringattn
from benchmarks.inputs import LAYOUTS, Shape, document_ends
from benchmarks.registry import benchmark
from benchmarks.runner import Contender, Session
from ringattn.attention.calibration import default_model

UNMASKED, AUTO = "zigzag ring without document masks", "auto"
BY_HAND: dict[str, dict[str, Any]] = {
    "ring": {"exchange": "ring"},
    "gather": {"exchange": "gather", "stages": 1},
    "gather in 4 stages": {"exchange": "gather", "stages": 4},
    "ulysses": {"exchange": "ulysses", "stages": 1},
    "ulysses in 2 stages": {"exchange": "ulysses", "stages": 2},
}
DEFAULT = Shape(2, 2, 64, "float32")


def _forward_and_backward(tensors: Sequence[Tensor], options: dict[str, Any]) -> object:
    q, k, v = tensors
    out = ringattn.context_parallel_attention(q, k, v, **options)
    return torch.autograd.grad(out.sum(), tensors)


@benchmark("auto-exchange", help='exchange="auto" beside each exchange chosen by hand, on packed batches', ranks=4)
def auto_exchange(
    here: Session,
    seq_len: int = 32768,
    shortest: int = 128,
    longest: int = 8192,
    shape: Shape = DEFAULT,
    seeds: Sequence[int] = (0, 1),
    measure: bool = False,
    rounds: int = 3,
    warmup: int = 1,
) -> None:
    """Measures a batch for each seed."""
    model = default_model(here.device.type)
    if measure:
        compute = ringattn.measure_compute(dtype=shape.torch_dtype, head_dim=shape.head_dim, device=here.device)
        model = ringattn.CostModel(ringattn.measure_link(device=here.device), compute)
    records, goals = here.records("auto_exchange"), here.records("goals")
    zigzag = ringattn.zigzag(seq_len, here.world_size)
    for seed in seeds:
        ends = document_ends(seq_len, shortest, longest, seed=seed)
        mask = ringattn.documents(ends) & ringattn.causal()
        balanced = ringattn.balanced(mask, seq_len, here.world_size)
        rows = [layout.num_tokens(here.rank) for layout in (zigzag, balanced)]
        unmasked, packed = ([x.requires_grad_() for x in shape.random(n, here.device)[:3]] for n in rows)
        options: dict[str, Any] = {"mask": mask, "layout": balanced, "model": model}
        ring = {"exchange": "ring", "mask": ringattn.causal(), "layout": zigzag, "model": model}
        contenders = [Contender(UNMASKED, partial(_forward_and_backward, unmasked, ring))]
        for name, exchange in {**BY_HAND, AUTO: {}}.items():
            contenders.append(Contender(name, partial(_forward_and_backward, packed, {**options, **exchange})))
        q, k, v = packed
        choice = ringattn.explain(q, k, v, **options)
        here.print(choice)
        predicted = {str(c): c.prediction.total_s for c in choice.candidates if c.prediction}
        predicted[AUTO] = predicted[str(choice.chosen)]
        seconds = here.time(f"batch {seed}", contenders, rounds, warmup)
        common = {"seed": seed, "documents": len(ends) - 1, "ranks": here.world_size, "model": str(model)}
        common["chosen"] = str(choice.chosen)
        for name in seconds:
            ratios = {"predicted_s": predicted.get(name), "times_unmasked": seconds.ratio(UNMASKED, name)}
            records.add(common, {"exchange": name}, seconds.summary(name), ratios)
        best = min(BY_HAND, key=seconds.median)
        speedup, over_best = seconds.ratio(UNMASKED, AUTO), seconds.ratio(AUTO, best)
        goals.add(common, {"best": best, "auto_times_unmasked": speedup, "auto_over_best": over_best})
    records.show("packed batches, forward and backward", "seed exchange median_s predicted_s times_unmasked")
    goals.show(
        "goals: auto_times_unmasked at least 2, auto_over_best at most 1.1",
        "seed chosen best auto_times_unmasked auto_over_best",
    )


def _random_call(seed: int, here: Session) -> tuple[Shape, int, dict[str, Any]]:
    """Returns a shape, a batch size and the options of a call, equal on all ranks."""
    draw = random.Random(seed)
    seq_len = draw.choice([256, 1024, 2048, 4096])
    kv_heads = draw.choice([1, 2, 4])
    shape = Shape(kv_heads * draw.choice([1, 2]), kv_heads, 64, draw.choice(["float32", "bfloat16"]))
    packed = ringattn.documents(document_ends(seq_len, 64, 1024, seed=seed)) & ringattn.causal()
    mask = draw.choice([ringattn.causal(), ringattn.full(), ringattn.sliding_window(seq_len // 8), packed])
    layout = LAYOUTS[draw.choice(list(LAYOUTS))](mask, seq_len, here.world_size)
    return shape, draw.choice([1, 4]) if seq_len < 2048 else 1, {"mask": mask, "layout": layout}


@benchmark("regret", help="the selected exchange beside the fastest one, on random calls", ranks=2)
def regret(here: Session, calls: int = 60, rounds: int = 5, warmup: int = 1) -> None:
    """Measures the cost model for each dtype, then runs every candidate of every call, forward and backward."""
    link = ringattn.measure_link(device=here.device)
    models = {}
    for dtype in ("float32", "bfloat16"):
        compute = ringattn.measure_compute(dtype=getattr(torch, dtype), device=here.device)
        models[dtype] = ringattn.CostModel(link, compute)
    records, ratios = here.records("regret"), []
    for seed in range(calls):
        shape, batch, options = _random_call(seed, here)
        rows = options["layout"].num_tokens(here.rank)
        tensors = [x.requires_grad_() for x in shape.random(rows, here.device, batch=batch)[:3]]
        q, k, v = tensors
        choice = ringattn.explain(q, k, v, model=models[shape.dtype], **options)
        contenders = [
            Contender(str(c), partial(_forward_and_backward, tensors, {**options, "exchange": c.value}))
            for c in choice.candidates
            if c.prediction
        ]
        seconds = here.time(f"call {seed}", contenders, rounds, warmup)
        best, chosen = min(seconds, key=seconds.median), str(choice.chosen)
        ratios.append(seconds.median(chosen) / seconds.median(best))
        call = {"call": seed, "mask": repr(options["mask"])[:60], "layout": str(options["layout"]), **vars(shape)}
        records.add(call, {"batch": batch, "chosen": chosen, "best": best, "regret": ratios[-1] - 1.0})
    records.show("regret of random calls", "call mask layout heads kv_heads dtype batch chosen best regret")
    ordered = sorted(ratios)
    worst = ordered[-1 - len(ordered) // 100]
    here.print(
        f"the selected exchange takes {statistics.mean(ratios):.3f} x the fastest on average, {worst:.2f} x at p99"
    )
