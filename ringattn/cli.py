"""The command line: `ringattn info` lists what this machine offers, `ringattn which` which backend runs a call."""

from __future__ import annotations

import argparse
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version

import torch
import torch.distributed as dist

import ringattn
from ringattn.kernels import BACKENDS, ProblemSpec, refusals
from ringattn.kernels.paged import PAGED_BACKENDS
from ringattn.score import Score


def info() -> str:
    """Returns the report of `ringattn info`: versions, devices, and the backends in order, available or why not."""
    lines = [
        f"ringattn  {ringattn.__version__}",
        f"python    {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch     {torch.__version__}",
        f"cpu       {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        f"cuda      {_cuda()}",
        f"exchange  {', '.join(_exchanges()) or 'none: torch was built without torch.distributed'}",
        f"hf        {_transformers()}",
        "backends, in the order in which backend=None tries them:",
    ]
    for number, (name, kernel) in enumerate(BACKENDS.items(), 1):
        lines += [_state(number, name, kernel.available()), f"     {'':<10} {kernel.about}"]
    lines.append("backends of decode_attention, in the same way:")
    lines += [_state(n, name, paged.available()) for n, (name, paged) in enumerate(PAGED_BACKENDS.items(), 1)]
    return "\n".join(lines)


def _state(number: int, name: str, reasons: list[str]) -> str:
    return f"  {number}. {name:<10} {'unavailable: ' + '; '.join(reasons) if reasons else 'available'}"


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "no device"
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _transformers() -> str:
    """Returns the installed version and the supported ones, without importing transformers."""
    try:
        return f"transformers {version('transformers')}; supported: {_supported('transformers')}"
    except PackageNotFoundError:
        return "transformers is not installed: pip install 'ringattn[hf]'"


def _supported(name: str) -> str:
    """Returns the supported versions of an optional dependency, from the metadata of the installed package."""
    try:
        found = (re.fullmatch(rf"{name}([^;]+);.*", requirement) for requirement in requires("ringattn") or ())
    except PackageNotFoundError:  # run from its sources
        return "see pyproject.toml"
    return next((match[1] for match in found if match), "see pyproject.toml")


def _exchanges() -> list[str]:
    if not dist.is_available():
        return []
    found = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}
    return [name for name, available in found.items() if available]


def which(call: ProblemSpec) -> tuple[str, bool]:
    """Returns the report of `ringattn which` for a call, and whether any backend runs it."""
    reasons = {name: refusals(name, call) for name in BACKENDS}
    chosen = next((name for name, why in reasons.items() if not why), None)
    lines = []
    for number, (name, why) in enumerate(reasons.items(), 1):
        verdict = "refuses: " + "; ".join(why) if why else "runs it" if name == chosen else "could run it"
        lines.append(f"  {number}. {name:<10} {verdict}")
    answer = "no backend runs this call" if chosen is None else f"backend=None takes {chosen!r}"
    return "\n".join([f"{answer}:", *lines]), chosen is not None


def _call(parser: argparse.ArgumentParser, args: argparse.Namespace) -> ProblemSpec:
    """Returns the call that the flags describe. By default, keys and values have the heads and the head dim of q."""
    head_dim, heads = args.head_dim, args.heads
    kv_heads = heads if args.kv_heads is None else args.kv_heads
    v_head_dim = head_dim if args.v_head_dim is None else args.v_head_dim
    if heads % kv_heads:
        parser.error(f"--heads {heads}: must be a multiple of --kv-heads {kv_heads}")
    if args.softcap is not None and not args.softcap > 0:
        parser.error(f"--softcap {args.softcap}: must be above 0")
    score = Score(head_dim**-0.5, args.softcap)
    dtype = getattr(torch, args.dtype)
    return ProblemSpec(args.device, dtype, heads, kv_heads, head_dim, v_head_dim, not args.forward_only, score)


def _positive(text: str) -> int:
    """Parses a positive integer."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: must be 1 or more")
    return number


def _add_call_flags(parser: argparse.ArgumentParser) -> None:
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("float64", "float32", "bfloat16", "float16"))
    parser.add_argument("--head-dim", type=_positive, default=128)
    parser.add_argument("--v-head-dim", type=_positive, help="head dim of the values; default: --head-dim")
    parser.add_argument("--heads", type=_positive, default=8)
    parser.add_argument("--kv-heads", type=_positive, help="default: --heads")
    parser.add_argument("--softcap", type=float)
    parser.add_argument("--forward-only", action="store_true", help="no gradients are needed")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 1 if `which` finds no backend."""
    parser = argparse.ArgumentParser(prog="ringattn", description="Exact attention over sharded sequences.")
    parser.add_argument("--version", action="version", version=f"ringattn {ringattn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "info", help="list what this machine offers: torch, devices, and each backend or why it is unavailable"
    )
    which_parser = commands.add_parser("which", help="show which backend runs a call, and why others refuse it")
    _add_call_flags(which_parser)
    args = parser.parse_args(argv)
    if args.command == "info":
        print(info())
        return 0
    report, runs = which(_call(which_parser, args))
    print(report)
    return 0 if runs else 1
