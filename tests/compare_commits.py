r"""Two commits side by side: outputs and gradients of a few hundred calls, bit for bit.

    git worktree add /tmp/old COMMIT
    python -m tests.compare_commits /tmp/old [--cases 400] [--seed 0]

Each tree runs the same calls on 4 ranks, with exchange, kernel and threads pinned, through the public functions only:
every exchange with masks, layouts, dtypes, kernels, grouped heads, sinks and softcaps; prefill and decoding over a
cache; and a patched model of transformers. It prints every call whose results differ, and by how much.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

WORLD = 4
Results = dict[str, torch.Tensor]


def cases(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yields calls, as plain values."""
    draw = random.Random(seed)
    for number in range(count):
        dtype = draw.choice(["float64", "float32", "bfloat16", "float16"])
        backends = ["reference", "sdpa"] if dtype == "float64" else ["reference", "sdpa", "native", "native"]
        kv_heads = draw.choice([1, 2, 4])
        backend = draw.choice(backends)
        plain = backend == "sdpa"
        yield {
            "number": number,
            "exchange": draw.choice(["ring", "ring 2x2", "gather", "gather 3", "ulysses", "ulysses 2", "hybrid"]),
            "mask": draw.choice(["full", "causal", "window", "documents", "prefix", "chunked", "list"]),
            "layout": draw.choice(["contiguous", "zigzag", "striped", "striped 3", "balanced"]),
            "length": draw.choice([1, 61, 128, 257]),
            "batch": draw.choice([1, 2]),
            "heads": kv_heads * draw.choice([1, 2, 3]),
            "kv_heads": kv_heads,
            "dim": draw.choice([8, 16, 64]),
            "v_dim": draw.choice([8, 16]),
            "dtype": dtype,
            "backend": backend,
            "softcap": None if plain else draw.choice([None, 2.5]),
            "sink": draw.choice([False, True]),
            "gradients": draw.choice(
                [(True, True, True), (True, True, True), (True, False, False), (False, True, True)]
            ),
        }


def solve(ringattn: Any, meshes: dict[str, Any], rank: int, case: dict[str, Any]) -> Results:
    """Runs one call forward and backward on this rank."""
    length, batch = case["length"], case["batch"]
    ends = [0, length // 3, length // 3, length // 2, length]
    masks = {
        "full": ringattn.full(),
        "causal": ringattn.causal(),
        "window": ringattn.sliding_window(5, 3),
        "documents": ringattn.documents(ends) & ringattn.causal(),
        "prefix": ringattn.prefix_lm(7),
        "chunked": ringattn.chunked(9) & ringattn.causal(),
    }
    mask = [masks["causal"], masks["window"]][:batch] if case["mask"] == "list" else masks[case["mask"]]
    one = mask[0] if isinstance(mask, list) else mask
    layouts = {
        "contiguous": lambda: ringattn.contiguous(length, WORLD),
        "zigzag": lambda: ringattn.zigzag(length, WORLD),
        "striped": lambda: ringattn.striped(length, WORLD),
        "striped 3": lambda: ringattn.striped(length, WORLD, 3),
        "balanced": lambda: ringattn.balanced(one, length, WORLD),
    }
    layout = layouts[case["layout"]]()
    generator = torch.Generator().manual_seed(1000 + case["number"])
    dtype = getattr(torch, case["dtype"])

    def whole(heads: int, dim: int) -> torch.Tensor:
        return torch.randn(batch, length, heads, dim, generator=generator, dtype=torch.float64).to(dtype)

    def local(x: torch.Tensor) -> torch.Tensor:
        return x[:, torch.as_tensor(layout.positions(rank))].clone()

    q, k, v, dout = (
        local(whole(heads, dim))
        for heads, dim in (
            (case["heads"], case["dim"]),
            (case["kv_heads"], case["dim"]),
            (case["kv_heads"], case["v_dim"]),
            (case["heads"], case["v_dim"]),
        )
    )
    for x, wanted in zip((q, k, v), case["gradients"]):
        x.requires_grad_(wanted)
    sink = torch.linspace(-1.0, 1.0, case["heads"]).requires_grad_() if case["sink"] else None
    name, _, stages = case["exchange"].partition(" ")
    group = meshes.get(case["exchange"], meshes["flat"])
    call = getattr(ringattn, f"{name}_attention_with_lse")
    options = {} if name == "ring" or not stages else {"stages": int(stages)}
    out, lse = call(
        q, k, v, group, mask=mask, layout=layout, softcap=case["softcap"], sink=sink, backend=case["backend"], **options
    )
    leaves = [x for x in (q, k, v, sink) if x is not None and x.requires_grad]
    gradients = torch.autograd.grad([out, lse], leaves, [dout, torch.full_like(lse, 0.25)])
    return {"out": out.detach(), "lse": lse.detach(), **{f"gradient {i}": x for i, x in enumerate(gradients)}}


def solve_cache(ringattn: Any, group: Any, rank: int) -> Results:
    """Prefills and decodes over a cache: by keys and by queries, replicated and by heads."""
    found: Results = {}
    for dtype in (torch.float32, torch.bfloat16):
        for heads, kv_heads, prompt in ((8, 2, 37), (4, 4, 300)):
            cache = ringattn.DistributedKVCache(
                num_layers=1, num_kv_heads=kv_heads, head_dim=16, num_pages=64, page_size=8, dtype=dtype, group=group
            )
            sequence, generator = cache.new(), torch.Generator().manual_seed(7)
            for turn, length in enumerate((prompt, 9)):
                layout = ringattn.zigzag(length, WORLD)
                rows = torch.as_tensor(layout.positions(rank))
                q, k, v = (
                    torch.randn(1, length, n, 16, generator=generator).to(dtype)[:, rows]
                    for n in (heads, kv_heads, kv_heads)
                )
                extension = cache.extend([sequence], layout)
                found[f"prefill {dtype} {heads} {turn}"] = ringattn.prefill_attention(q, k, v, cache, 0, extension)
            for step, function in enumerate((ringattn.decode_attention, ringattn.decode_attention_by_heads)):
                q, k, v = (torch.randn(1, 2, n, 16, generator=generator).to(dtype) for n in (heads, kv_heads, kv_heads))
                found[f"decode {dtype} {heads} {step}"] = function(q, k, v, cache, 0, cache.extend([sequence], 2))
    return found


def solve_model(group: Any) -> Results:
    """Trains and generates with a patched model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import ringattn.hf

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model: Any = LlamaForCausalLM(config)
    tokens = torch.randint(64, (2, 45))
    with ringattn.hf.patch(model, group, exchange="ring", backend="sdpa") as handle:
        share = handle.shard({"input_ids": tokens, "labels": tokens})
        loss = model(**share).loss
        loss.backward()
        gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        cache = ringattn.hf.RingCache(handle, num_pages=64)
        text = model.generate(tokens[:, :20], past_key_values=cache, max_new_tokens=6, do_sample=False)
    return {"loss": loss.detach(), "text": text, **gradients}


def rank_main(rank: int, out: str, count: int, seed: int) -> None:
    """Runs everything on one rank, and writes the results."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    import ringattn

    assert Path(ringattn.__file__).is_relative_to(os.environ["PYTHONPATH"]), ringattn.__file__
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=WORLD)
    meshes: dict[str, Any] = {
        "flat": dist.group.WORLD,
        "ring 2x2": init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner")),
        "hybrid": init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses")),
    }
    found = {repr(case): solve(ringattn, meshes, rank, case) for case in cases(count, seed)}
    found["cache"] = solve_cache(ringattn, dist.group.WORLD, rank)
    found["model"] = solve_model(dist.group.WORLD)
    torch.save(found, f"{out}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_tree(tree: Path, out: Path, arguments: argparse.Namespace) -> list[dict[str, Results]]:
    """Runs this file on the package of a tree."""
    out.mkdir()
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--cases",
        str(arguments.cases),
        "--seed",
        str(arguments.seed),
    ]
    ranks = [
        subprocess.Popen([*command, "--rank", str(rank), "--out", str(out)], env=environment, cwd=out)
        for rank in range(WORLD)
    ]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit(f"{tree}: a rank failed")
    return [torch.load(out / f"rank{rank}.pt") for rank in range(WORLD)]


def compare(old: list[dict[str, Results]], new: list[dict[str, Results]]) -> int:
    """Prints what differs, and returns how many calls do."""
    differing = 0
    for case in old[0]:
        worst = 0.0
        for a, b in zip(old, new, strict=True):
            for name, x in a[case].items():
                y = b[case][name]
                assert (x.shape, x.dtype) == (y.shape, y.dtype), (case, name)
                if not torch.equal(x, y):
                    worst = max(
                        worst, float((x.double() - y.double()).abs().max() / x.double().abs().max().clamp(1e-30))
                    )
        if worst:
            differing += 1
            print(f"{worst:.2e} {case}")
    return differing


def main() -> None:
    """Compares, or runs one rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?", type=Path, help="a worktree of the other commit")
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        rank_main(arguments.rank, arguments.out, arguments.cases, arguments.seed)
        return
    here = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        old = run_tree(arguments.old.resolve(), Path(folder) / "old", arguments)
        new = run_tree(here, Path(folder) / "new", arguments)
    differing = compare(old, new)
    print(f"{len(old[0])} calls on {WORLD} ranks: {differing} differ")


if __name__ == "__main__":
    main()
