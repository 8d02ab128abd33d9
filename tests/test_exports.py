"""What the package shows to the world, and what it promises about its own source."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest

import ringattn

PACKAGE = Path(str(files("ringattn")))
MODULES = sorted(PACKAGE.rglob("*.py"))
MANUAL = PACKAGE.parent / "docs" / "api.md"
MAX_LINES = 420

ATTENTION = {f"{way}_attention{also}" for way in ("gather", "hybrid", "ring", "ulysses") for also in ("", "_with_lse")}
ATTENTION |= {"context_parallel_attention", "context_parallel_attention_with_lse"}
INFERENCE = {
    "decode_attention",
    "decode_attention_by_heads",
    "load_cache",
    "prefill_attention",
    "reshard",
    "save_cache",
}
CALLS = (
    ATTENTION
    | INFERENCE
    | {"explain", "measure_compute", "measure_link"}
    | {"position_ids", "shard", "shard_batch", "unshard"}
)
LAYOUTS = {"balanced", "contiguous", "striped", "zigzag"}
MASKS = {"causal", "chunked", "documents", "full", "key_range", "prefix_lm", "sliding_window"}
VALUES = {"Choice", "Compute", "CostModel", "DistributedKVCache", "Layout", "Link", "Mask", "Gather", "Ring", "Ulysses"}
ERRORS = {
    "ArgumentError",
    "ArgumentTypeError",
    "BackendError",
    "CheckpointError",
    "DisagreementError",
    "LayoutError",
    "MaskError",
    "OutOfPagesError",
    "RingAttnError",
    "SequenceError",
    "SnapshotError",
}


def test_all_is_what_is_promised() -> None:
    assert set(ringattn.__all__) == CALLS | LAYOUTS | MASKS | VALUES | ERRORS
    assert list(ringattn.__all__) == sorted(ringattn.__all__)


@pytest.mark.parametrize("name", ringattn.__all__)
def test_names_exist_and_are_documented(name: str) -> None:
    assert (inspect.getdoc(getattr(ringattn, name)) or "").strip()


def test_the_manual_lists_every_name_and_no_other() -> None:
    first_sections = MANUAL.read_text().partition("autoexception:: DisagreementError")
    listed = re.findall(r"^\.\. auto(?:function|class|exception):: (\w+)", "".join(first_sections[:2]), re.MULTILINE)
    assert sorted(listed) == sorted(ringattn.__all__)


# A docstring may refer to another public function for what the two have in common.
REFERENCE = re.compile(r"^It (takes the arguments|has the arguments,? (?:errors )?and \w+) of `(\w+)`", re.MULTILINE)


def described_parameters(function: Callable[..., object]) -> set[str]:
    """The parameters described by a docstring, or by the docstring of a function it refers to."""
    text = inspect.getdoc(function) or ""
    found = set(re.findall(r"^ {4}(\w+(?:, \w+)*): ", text, re.MULTILINE))
    names = {name for names in found for name in names.split(", ")}
    for _, other in REFERENCE.findall(text):
        names |= described_parameters(getattr(ringattn, other))
    return names


def sections_missing(function: Callable[..., object], sends: bool) -> list[str]:
    """The sections, and parameters, that a function's docstring should have and has not."""
    text = inspect.getdoc(function) or ""
    parameters = list(inspect.signature(function).parameters)
    shared = " ".join(what for what, _ in REFERENCE.findall(text))
    missing = []
    if parameters and not shared and not re.search(r"^Args:", text, re.MULTILINE):
        missing.append("Args")
    if sends and not re.search(r"\bReturns\b", text):
        missing.append("Returns")
    if parameters and "errors" not in shared and not re.search(r"^Raises:", text, re.MULTILINE):
        missing.append("Raises")
    if sends and "communication" not in shared and not re.search(r"^Communication: ", text, re.MULTILINE):
        missing.append("Communication")
    if "Args" in missing:
        return missing
    described = described_parameters(function)
    return missing + [name for name in parameters if name not in described]


@pytest.mark.parametrize("name", sorted(CALLS))
def test_calls_tell_what_they_take_give_raise_and_send(name: str) -> None:
    assert sections_missing(getattr(ringattn, name), sends=True) == []


@pytest.mark.parametrize("name", sorted(LAYOUTS | MASKS))
def test_constructors_tell_what_they_take_and_raise(name: str) -> None:
    assert sections_missing(getattr(ringattn, name), sends=False) == []


def test_missing_sections_are_found() -> None:
    def bare(x: int, y: int) -> int:
        """Adds.

        Args:
            x: a number.
        """
        return x + y

    assert sections_missing(bare, sends=True) == ["Returns", "Raises", "Communication", "y"]


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
    for name in CALLS | LAYOUTS | MASKS:
        signature = inspect.signature(getattr(ringattn, name))
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules(module: Path) -> None:
    """None is long, each says what it is for. One reads the environment, to tell that init was forgotten."""
    source = module.read_text()
    tree = ast.parse(source)
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    environment = {"environ", "environb", "getenv", "putenv"}
    assert names & environment == ({"environ"} if module.name == "topology.py" else set())
    assert len(source.splitlines()) < MAX_LINES
    assert ast.get_docstring(tree)


def test_there_are_modules() -> None:
    assert len(MODULES) > 10
