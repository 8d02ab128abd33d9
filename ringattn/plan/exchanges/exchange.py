"""What an exchange is: a frozen dataclass that writes programs, bounds their time, and names the meshes it runs on."""

from __future__ import annotations

import ast
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import ClassVar, TypeVar

from ringattn.cost.cost_model import CostModel
from ringattn.cost.lower_bound import LowerBound
from ringattn.errors import ArgumentError
from ringattn.plan.comm_pattern import CommPattern
from ringattn.plan.head_shards import HeadShard
from ringattn.plan.plan import Program
from ringattn.plan.workload import Workload


@dataclass(frozen=True)
class Exchange(ABC):
    """How blocks travel between ranks: a value, equal on every rank.

    A subclass is a frozen dataclass of integers and exchanges; `register_exchange` makes it known.
    """

    # What the axes of a mesh of two dims must be called, slow to fast; None where it runs on one axis only.
    mesh_axes: ClassVar[tuple[str, str] | None] = None
    # The content as Python writes it. It is a plain attribute, so that torch.compile guards it and nothing else.
    text: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        given = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.init)
        object.__setattr__(self, "text", f"{type(self).__name__}({given})")

    def __repr__(self) -> str:
        return self.text

    @property
    @abstractmethod
    def name(self) -> str:
        """What people call it."""

    @abstractmethod
    def program(self, pattern: CommPattern, rank: int, *, returns: bool) -> Program:
        """Returns rank's steps.

        Args:
            pattern: which rank needs which rows.
            rank: whose steps.
            returns: whether `pattern.moving.returning` of what moves returns to the block's own rank.
        """

    @abstractmethod
    def rows_moved(self, pattern: CommPattern) -> tuple[int, int]:
        """Returns how many rows all ranks together send: of what moves, and of what returns."""

    @abstractmethod
    def lower_bound(self, workload: Workload, model: CostModel) -> LowerBound:
        """Returns the least time of one direction."""

    def shard_heads(self, heads: int, kv_heads: int, mesh: tuple[int, ...]) -> tuple[tuple[HeadShard, ...], ...] | None:
        """Returns which heads each rank of the last axis computes, [stage][rank]; None where all compute all heads.

        Where it returns shards, `inner` runs along the other axes.
        """
        return None

    @property
    def inner(self) -> Exchange:
        """The exchange that writes programs: itself, or the one that runs once heads are sharded."""
        return self


ExchangeClass = TypeVar("ExchangeClass", bound=type[Exchange])
_CLASSES: dict[str, type[Exchange]] = {}


def register_exchange_class(cls: ExchangeClass) -> ExchangeClass:
    """Makes the class of an exchange known to `parse_exchange`."""
    _CLASSES[cls.__name__] = cls
    return cls


def parse_exchange(text: str) -> Exchange:
    """Returns the exchange whose `text` this is.

    Raises:
        ArgumentError: when it is not the text of a registered exchange.
    """
    found = _evaluate(ast.parse(text, mode="eval").body)
    if not isinstance(found, Exchange):
        raise ArgumentError(f"exchange={text:.100}: must be one of {', '.join(_CLASSES)}")
    return found


def _evaluate(node: ast.expr) -> object:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CLASSES:
        return _CLASSES[node.func.id](**{str(k.arg): _evaluate(k.value) for k in node.keywords})
    return ast.literal_eval(node)
