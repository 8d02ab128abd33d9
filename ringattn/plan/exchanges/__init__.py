"""Exchanges: how blocks travel between ranks. EXCHANGES is the table of names; a new exchange is one file and one line.

@register_exchange_class
@dataclass(frozen=True, repr=False)
class MyExchange(Exchange): ...

register_exchange("mine", MyExchange)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from ringattn.errors import check_integer
from ringattn.geometry.layout import Layout
from ringattn.geometry.masks import K_START, Q_START, Mask
from ringattn.geometry.tiles import pairs_of_queries
from ringattn.plan.comm_pattern import CommPattern
from ringattn.plan.comm_volume import pairs_of_ranks
from ringattn.plan.exchanges.exchange import Exchange, parse_exchange, register_exchange_class
from ringattn.plan.exchanges.gather import Gather
from ringattn.plan.exchanges.ring import Ring
from ringattn.plan.exchanges.ulysses import Ulysses
from ringattn.plan.payload import AttentionShape
from ringattn.plan.plan import Phase, Plan, Program

__all__ = [
    "EXCHANGES",
    "Exchange",
    "Gather",
    "Ring",
    "Ulysses",
    "build_plan",
    "parse_exchange",
    "register_exchange",
    "register_exchange_class",
    "select_backward",
]

# How much busier than the busiest rank of a backward by keys one may be in a backward by queries, which is fewer bytes.
_MAX_IMBALANCE = 1.05


@dataclass(frozen=True)
class NamedExchange:
    """An exchange that a call may ask for by name, and that the automatic choice tries.

    Args:
        name: as `exchange=` takes it.
        make: returns the exchange, given its stages.
        num_axes: the number of axes of the mesh that it runs on.
        stages: how many the automatic choice tries; () where it has none.
    """

    name: str
    make: Callable[[int], Exchange]
    num_axes: int = 1
    stages: tuple[int, ...] = ()


EXCHANGES: dict[str, NamedExchange] = {}


def register_exchange(
    name: str, cls: Callable[..., Exchange], *, num_axes: int = 1, stages: tuple[int, ...] = ()
) -> None:
    """Enters an exchange into the table, behind those that are there.

    Args:
        name: as `exchange=` takes it.
        cls: makes the exchange; takes `stages=` if `stages` is not empty.
        num_axes: the number of axes of the mesh that it runs on, 1 or 2.
        stages: how many the automatic choice tries; () where it has none.
    """

    def make(number: int) -> Exchange:
        check_integer("stages", number, 1)
        return cls(stages=number) if stages else cls()

    EXCHANGES[name] = NamedExchange(name, make, num_axes, stages)


# The plainest first: of exchanges that are equally fast, the automatic choice takes the first.
register_exchange("ring", Ring)
register_exchange("gather", Gather, stages=(1, 4))
register_exchange("ulysses", Ulysses, stages=(1, 2))
register_exchange("double ring", Ring, num_axes=2)
register_exchange("hybrid", Ulysses, num_axes=2, stages=(1, 2))


@lru_cache(maxsize=128)
def build_plan(
    exchange: Exchange,
    masks: tuple[Mask, ...],
    layout: Layout,
    kv_layout: Layout,
    rank: int,
    backward: Phase = Phase.BACKWARD,
    *,
    forward: Phase = Phase.FORWARD,
    mesh: tuple[int, ...] = (),
) -> Plan:
    """Returns rank's plan, built once per combination of arguments.

    Args:
        exchange: such as Ring().
        masks: one for all batch rows, or one for each.
        layout: which queries each rank holds.
        kv_layout: which keys and values each rank holds; of as many ranks as `layout`.
        rank: whose plan.
        backward, forward: what moves in each direction.
        mesh: the number of ranks along each axis, the slow one first; () is one axis.
    Raises:
        MaskError: when a mask does not fit the lengths of the layouts.
    """

    def program(phase: Phase) -> Program:
        pattern = CommPattern(phase.moving, masks, layout, kv_layout, mesh)
        return exchange.program(pattern, rank, returns=phase.returning is not None)

    work = pairs_of_queries(masks, layout, kv_layout.seq_len)
    return Plan(exchange.name, rank, layout.world_size, program(forward), program(backward), work)


@lru_cache(maxsize=128)
def select_backward(
    exchange: Exchange,
    masks: tuple[Mask, ...],
    layout: Layout,
    kv_layout: Layout,
    shape: AttentionShape,
    wanted: tuple[bool, bool] = (True, True),
    mesh: tuple[int, ...] = (),
) -> Phase:
    """Returns the phase that moves fewer bytes over all ranks in the backward, the same on each rank.

    Where queries move, a rank computes all pairs of its own keys. Layouts balance the pairs of queries, not of keys:
    queries do not move if that would give the busiest rank more pairs.

    Args:
        exchange, masks, layout, kv_layout, mesh: of the plan.
        shape: of the tensors.
        wanted: whether gradients of (q, k or v) are wanted; others are not sent.
    """
    total = {}
    for phase, returns in ((Phase.BACKWARD, wanted[1]), (Phase.BACKWARD_BY_QUERIES, wanted[0])):
        moved, returned = exchange.rows_moved(CommPattern(phase.moving, masks, layout, kv_layout, mesh))
        total[phase] = moved * shape.row_bytes(phase.moving)
        total[phase] += returned * shape.row_bytes(phase.moving.returning) if returns else 0
    if total[Phase.BACKWARD_BY_QUERIES] >= total[Phase.BACKWARD]:
        return Phase.BACKWARD
    of_keys, of_queries = (pairs_of_ranks(masks, layout, kv_layout, column).max() for column in (K_START, Q_START))
    return Phase.BACKWARD_BY_QUERIES if of_keys <= _MAX_IMBALANCE * of_queries else Phase.BACKWARD
