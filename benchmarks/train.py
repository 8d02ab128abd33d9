"""The main job: train a small byte-level transformer on real text, its context sharded over the ranks.

    torchrun --nproc-per-node=2 -m benchmarks.train --context 16384 --steps 8 --out results/demo

The text is the Python standard library's own source. First all ranks train together, each holding its share of
every sequence; then rank 0 trains the same model on the same batches by itself, with torch's own attention and as
many threads as there are ranks. Both losses are printed step by step: they are equal to rounding, or the program
fails. Pictures of the losses and of one ring step go to --out. On GPUs it runs unchanged, over NCCL.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import ringattn
from benchmarks import plots
from benchmarks.measure import Lines, peak_bytes, progress
from benchmarks.session import Session, session
from benchmarks.timeline import record
from ringattn.attention.request import Masks
from ringattn.parallel.decoder import Attend, Decoder, DecoderConfig

VOCABULARY = 256  # bytes
MASK = ringattn.causal()
LAYOUTS = {"zigzag": ringattn.zigzag, "contiguous": ringattn.contiguous, "striped": ringattn.striped}


@dataclass(frozen=True)
class Run:
    """What one training run showed."""

    losses: list[float]
    tokens_per_s: float
    peak_mib: list[float]  # of each process


def text(num_bytes: int) -> Tensor:
    """Returns the first bytes of the standard library's source, (num_bytes,) int64, the same on every rank."""
    parts: list[bytes] = []
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        parts.append(path.read_bytes())
        size += len(parts[-1])
        if size >= num_bytes:
            break
    if size < num_bytes:
        raise SystemExit(
            f"the standard library holds {size:,} bytes of source; --steps x --context wants {num_bytes:,}"
        )
    return torch.frombuffer(bytearray(b"".join(parts)[:num_bytes]), dtype=torch.uint8).long()


def batches(context: int, steps: int) -> list[dict[str, Tensor]]:
    """Returns one sequence for each step, and its labels: the same bytes, yet to be shifted."""
    rows = text(context * steps).view(steps, 1, context)
    return [{"input_ids": row, "labels": row} for row in rows]


def train(
    here: Session,
    config: DecoderConfig,
    attend: Attend,
    shares: list[dict[str, Tensor]],
    sum_over_ranks: Callable[[Tensor], None],
    lr: float,
    tick: Callable[[int, float], None],
) -> Run:
    """Trains on this rank's shares of the batches.

    The loss is a sum over this rank's valid tokens, divided by the number of valid tokens on all ranks; gradients are
    summed over the ranks. So it does not matter how tokens are spread, or whether a rank has any.
    """
    torch.manual_seed(0)
    model = Decoder(config).to(here.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

    def gradients(share: Mapping[str, Tensor]) -> float:
        labels = share["shift_labels"]
        num_valid = (labels != -100).sum()
        sum_over_ranks(num_valid)
        logits = model(share["input_ids"], positions=share["position_ids"], mask=MASK, attend=attend)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum") / num_valid
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        for parameter in model.parameters():
            assert parameter.grad is not None
            sum_over_ranks(parameter.grad)
        total = loss.detach()
        sum_over_ranks(total)
        return float(total)

    losses = []
    start = time.perf_counter()
    for step, share in enumerate(shares):
        losses.append(gradients(share))
        optimizer.step()
        tick(step, losses[-1])
    seconds = time.perf_counter() - start
    tokens = sum(share["input_ids"].numel() for share in shares)
    peak = peak_bytes(lambda: gradients(shares[0]))
    return Run(losses, tokens / seconds, [peak / 2**20])


def main() -> None:
    """Trains by flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=16384, help="tokens in a sequence, over all ranks")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--layout", choices=LAYOUTS, default="zigzag")
    parser.add_argument("--backend", help="a kernel out of `ringattn info`; the first that can if not given")
    parser.add_argument("--out", type=Path, default=Path("results/demo"))
    args = parser.parse_args()
    config = DecoderConfig(
        vocab_size=VOCABULARY,
        num_layers=args.layers,
        dim=args.dim,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        hidden=3 * args.dim,
    )
    with session() as here:
        whole = batches(args.context, args.steps)
        whole = [{name: x.to(here.device) for name, x in batch.items()} for batch in whole]
        ring = train_together(here, args, config, whole)
        spans = record(here, LAYOUTS[args.layout](args.context, here.world_size), config)
        if here.rank == 0:
            single = train_alone(here, args, config, whole, ring)
            report(args, here, ring, single)
            plots.losses(ring.losses, single.losses, here.world_size, args.out / "losses.png")
            plots.timeline(spans, args.out / "timeline.png")
            print(f"pictures: {args.out / 'losses.png'}, {args.out / 'timeline.png'}")
        dist.barrier()


def train_together(
    here: Session, args: argparse.Namespace, config: DecoderConfig, whole: list[dict[str, Tensor]]
) -> Run:
    """Trains over all ranks."""
    layout = LAYOUTS[args.layout](args.context, here.world_size)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Masks) -> Tensor:
        return ringattn.ring_attention(q, k, v, mask=mask, layout=layout, backend=args.backend)

    def sum_over_ranks(x: Tensor) -> None:
        dist.all_reduce(x)

    shares = [ringattn.shard_batch(batch, layout) for batch in whole]
    with progress(f"{here.world_size} ranks   ", args.steps, here.rank == 0) as tick:
        run = train(here, config, attend, shares, sum_over_ranks, args.lr, lambda step, loss: tick())
    everyone: list[Run] = [run] * here.world_size
    dist.all_gather_object(everyone, run)
    return Run(run.losses, sum(r.tokens_per_s for r in everyone), [mib for r in everyone for mib in r.peak_mib])


def train_alone(
    here: Session, args: argparse.Namespace, config: DecoderConfig, whole: list[dict[str, Tensor]], ring: Run
) -> Run:
    """Trains in this process alone, and prints each step's loss beside that of all ranks."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Masks) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    torch.set_num_threads(here.world_size)
    positions = torch.arange(args.context, device=here.device)[None]
    shares = [
        {
            "input_ids": batch["input_ids"],
            "shift_labels": F.pad(batch["labels"][:, 1:], (0, 1), value=-100),
            "position_ids": positions,
        }
        for batch in whole
    ]
    print(f"{'step':>4}  {f'{here.world_size} ranks':>10}  {'1 process':>10}  {'difference':>10}")
    with progress("1 process ", args.steps, True) as tick:

        def show(step: int, loss: float) -> None:
            tick()
            print(f"{step:>4}  {ring.losses[step]:>10.6f}  {loss:>10.6f}  {ring.losses[step] - loss:>10.1e}")

        return train(here, config, attend, shares, lambda x: None, args.lr, show)


def report(args: argparse.Namespace, here: Session, ring: Run, single: Run) -> None:
    """Prints and writes what both runs showed; fails if their losses differ by more than rounding."""
    lines = Lines(args.out / "train.jsonl")
    for name, run in ((f"{here.world_size} ranks", ring), ("1 process", single)):
        lines.add({"run": name, "context": args.context, **asdict(run)})
        peaks = ", ".join(f"{mib:,.0f}" for mib in run.peak_mib)
        print(f"{name:>10}: {run.tokens_per_s:>8,.0f} tokens/s, peak memory of a step, by rank: {peaks} MiB")
    worst = max(abs(a - b) / abs(b) for a, b in zip(ring.losses, single.losses, strict=True))
    print(f"{args.steps} steps, {args.context:,} tokens of context: losses equal to {worst:.1e} (relative)")
    if not worst < 1e-4:
        raise SystemExit("the losses of the two runs differ by more than rounding")


if __name__ == "__main__":
    main()
