"""The table of benchmarks and their command line: `python -m benchmarks NAME [flags]`.

A benchmark is a function with the decorator `benchmark`. Its first parameter is the Session; the others become flags:

    lengths: Sequence[int] = (4096, 8192)                       --lengths 4096 8192
    window: Annotated[int | None, "tokens"] = None              --window 512, with a help text
    layout: Annotated[str, LAYOUTS] = "zigzag"                  --layout zigzag, one of the keys of LAYOUTS
    mixes: Annotated[Sequence[Mix], Mix.parse] = DEFAULT        --mixes ring=8, converted by a function
    compile: bool = False                                       --compile
    recipe: Recipe = Recipe()                                   one flag for each field of a dataclass
    results: Sequence[Path]                                     positional arguments, or all that follows --
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import benchmarks
from benchmarks.runner import session

Function = TypeVar("Function", bound=Callable[..., None])


@dataclass(frozen=True)
class Benchmark:
    """An entry of the table; `ranks` is the default number of ranks, None for one process without a group."""

    name: str
    help: str
    ranks: int | None
    function: Callable[..., None]


_TABLE: dict[str, Benchmark] = {}


def benchmark(name: str, *, help: str, ranks: int | None = None) -> Callable[[Function], Function]:
    """Registers a function.

    Args:
        name: on the command line.
        help: a line for `--list`.
        ranks: how many ranks run it by default; None is one process without a process group.
    """

    def register(function: Function) -> Function:
        _TABLE[name] = Benchmark(name, help, ranks, function)
        return function

    return register


def all_benchmarks() -> dict[str, Benchmark]:
    """Imports every module of this package and returns all benchmarks by name."""
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if module.name == "__main__":
            continue
        try:
            importlib.import_module(f"benchmarks.{module.name}")
        except ModuleNotFoundError as error:
            print(f"benchmarks/{module.name}.py is left out: {error}", file=sys.stderr)
    return dict(sorted(_TABLE.items()))


def find(name: str) -> Benchmark:
    """Imports the module that registers a benchmark, and returns the benchmark."""
    for path in Path(__file__).parent.glob("*.py"):
        if f'@benchmark("{name}"' in path.read_text():
            importlib.import_module(f"benchmarks.{path.stem}")
    if name not in _TABLE:
        raise SystemExit(f"{name}: no such benchmark; `python -m benchmarks --list` shows all")
    return _TABLE[name]


def parse(chosen: Benchmark, argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Returns the common flags (out, device, ranks) and the arguments of the function."""
    at = list(argv).index("--") if "--" in argv else len(argv)
    flags, rest = list(argv[:at]), list(argv[at + 1 :])
    about = inspect.getdoc(inspect.getmodule(chosen.function)) or chosen.help
    parser = argparse.ArgumentParser(
        f"python -m benchmarks {chosen.name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results") / chosen.name, help="the folder of the results")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="the default is cuda where torch sees a GPU")
    if chosen.ranks is not None:
        parser.add_argument("--ranks", type=int, default=chosen.ranks, help="started here unless torchrun did")
    common = {action.dest for action in parser._actions}
    parameters = _parameters(chosen.function)
    for name, (hint, default) in parameters.items():
        own = get_type_hints(hint, include_extras=True) if is_dataclass(hint) else {}
        for field in own:
            _add_flag(parser, field, own[field], getattr(default, field))
        if not own:
            _add_flag(parser, name, hint, default)
    found = parser.parse_args(flags)
    values = vars(found)
    for name, (hint, default) in parameters.items():
        if is_dataclass(hint):
            values[name] = type(default)(**{field.name: values[field.name] for field in fields(hint)})
        elif default is inspect.Parameter.empty and rest:
            values[name] = rest
    given = {name: values[name] for name in parameters}
    return argparse.Namespace(**{name: values[name] for name in common if name in values}), given


def _parameters(function: Callable[..., None]) -> dict[str, tuple[Any, Any]]:
    """Each parameter behind the session: its type and its default."""
    hints = get_type_hints(function, include_extras=True)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return {parameter.name: (hints[parameter.name], parameter.default) for parameter in parameters}


def _add_flag(parser: argparse.ArgumentParser, name: str, hint: Any, default: Any) -> None:
    options: dict[str, Any] = {}
    if get_origin(hint) is Annotated:
        hint, *notes = get_args(hint)
        for note in notes:
            if isinstance(note, str):
                options["help"] = note
            elif callable(note):
                options["type"] = _converter(note)
            else:
                options["choices"] = list(note)
    flag = f"--{name.replace('_', '-')}"
    if hint is bool:
        parser.add_argument(flag, action="store_true", default=default, **options)
        return
    options.setdefault("type", (get_args(hint) or (hint,))[0])
    if default is inspect.Parameter.empty:
        parser.add_argument(name, nargs="*", **options)
        return
    if get_origin(hint) is Sequence:
        options["nargs"] = "+"
    parser.add_argument(flag, default=default, **options)


def _converter(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def converted(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return converted


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one benchmark, or lists all."""
    name, *flags = (sys.argv[1:] if argv is None else list(argv)) or ["--list"]
    if name in ("--list", "--help", "-h"):
        for one in all_benchmarks().values():
            print(f"{one.name:<16} {one.help}{f' ({one.ranks} ranks)' if one.ranks else ''}")
        return
    chosen = find(name)
    common, given = parse(chosen, flags)
    if chosen.ranks is not None and "RANK" not in os.environ:
        _start_ranks(common.ranks, [name, *flags])
    with session(common.out, common.device, distributed=chosen.ranks is not None) as here:
        chosen.function(here, **given)


def _start_ranks(ranks: int, argv: list[str]) -> None:
    """Replaces this process by torchrun; ranks share the cores, so each computes with one thread."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "benchmarks", *argv]
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *command], {"OMP_NUM_THREADS": "1", **os.environ})
