"""Exchanges: how what is needed gets to whoever needs it. Each is a value that writes plans; a new one is one more."""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

from ringattn.geometry.layout import Layout
from ringattn.geometry.masks import K_START, Q_START, Mask
from ringattn.geometry.tiles import pairs_of_queries
from ringattn.plan.comm_pattern import CommPattern
from ringattn.plan.comm_volume import pairs_of_ranks
from ringattn.plan.exchanges.gather import Gather
from ringattn.plan.exchanges.ring import Ring
from ringattn.plan.payload import AttentionShape
from ringattn.plan.plan import Phase, Plan, Program

__all__ = ["Exchange", "Gather", "Ring", "build_plan", "select_backward"]

# How much busier than the busiest rank of a backward by keys one may be in a backward by queries, which is fewer bytes.
_MAX_IMBALANCE = 1.05


class Exchange(Protocol):
    """A way for blocks to travel: a value, the same on every rank."""

    def __hash__(self) -> int: ...

    @property
    def name(self) -> str:
        """For people."""
        ...

    def program(self, travel: CommPattern, rank: int, backward: bool) -> Program:
        """Returns rank's steps; in the backward the gradients of what travels come home."""
        ...

    def rows_moved(self, travel: CommPattern) -> tuple[int, int]:
        """Returns how many rows all ranks together send: of what is carried, and of its gradients in a backward."""
        ...


@lru_cache(maxsize=128)
def build_plan(
    exchange: Exchange,
    masks: tuple[Mask, ...],
    layout: Layout,
    kv_layout: Layout,
    rank: int,
    backward: Phase = Phase.BACKWARD,
) -> Plan:
    """Returns rank's plan, built once per combination of arguments.

    Args:
        exchange: how blocks travel, such as Ring().
        masks: one for all batch rows, or one for each.
        layout: who holds which queries.
        kv_layout: who holds which keys and values; of as many ranks as `layout`.
        rank: whose plan.
        backward: what travels in the backward.
    Raises:
        MaskError: when a mask does not fit the lengths of the layouts.
    """
    forward, back = (
        exchange.program(CommPattern(phase.carried, masks, layout, kv_layout), rank, phase.is_backward)
        for phase in (Phase.FORWARD, backward)
    )
    work = pairs_of_queries(masks, layout, kv_layout.seq_len)
    return Plan(exchange.name, rank, layout.world_size, forward, back, work)


@lru_cache(maxsize=128)
def select_backward(
    exchange: Exchange,
    masks: tuple[Mask, ...],
    layout: Layout,
    kv_layout: Layout,
    sizes: AttentionShape,
    wanted: tuple[bool, bool] = (True, True),
) -> Phase:
    """Returns what should travel in the backward: what is fewer bytes over all ranks, the same on each of them.

    Where queries travel, a rank computes what its own keys have to do with. Layouts make the work of queries even, and
    that of keys may be anything: queries do not travel where they would make the busiest rank busier.

    Args:
        exchange, masks, layout, kv_layout: of the plan.
        sizes: of the tensors.
        wanted: whether gradients of (q, k or v) are wanted; those that are not do not travel.
    """
    total = {}
    for phase, comes_home in ((Phase.BACKWARD, wanted[1]), (Phase.BACKWARD_BY_QUERIES, wanted[0])):
        travel = CommPattern(phase.carried, masks, layout, kv_layout)
        carried, summed = exchange.rows_moved(travel)
        total[phase] = carried * sizes.row_bytes(phase.carried)
        total[phase] += summed * sizes.row_bytes(phase.carried.gradient) if comes_home else 0
    if total[Phase.BACKWARD_BY_QUERIES] >= total[Phase.BACKWARD]:
        return Phase.BACKWARD
    of_keys, of_queries = (pairs_of_ranks(masks, layout, kv_layout, column).max() for column in (K_START, Q_START))
    return Phase.BACKWARD_BY_QUERIES if of_keys <= _MAX_IMBALANCE * of_queries else Phase.BACKWARD
