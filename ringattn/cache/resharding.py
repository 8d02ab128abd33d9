"""Moves a live cache to the ranks of another group."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.cache.kv_cache import CacheSpec, DistributedKVCache
from ringattn.cache.pages import PageMove, PagePools
from ringattn.comm.messages import Message, post
from ringattn.comm.topology import rank_mesh, resolve_group
from ringattn.errors import ArgumentError, DisagreementError
from ringattn.types import Group

# The page moves between two ranks of the common group, by (sender, receiver).
Routes = dict[tuple[int, int], list[PageMove]]


class _RankState(NamedTuple):
    """What one rank sends to all others before anything moves.

    Args:
        old_rank: its rank in the old cache, or None.
        new_rank: its rank in the new cache, or None.
        contents: spec and page tables of the old cache; from rank 0 of the old cache only.
        history: the history digest of the old cache.
        num_pages: the argument of `reshard`.
        error: a disagreement of the old cache's ranks that has not been raised yet.
    """

    old_rank: int | None
    new_rank: int | None
    contents: tuple[CacheSpec, PagePools] | None
    history: int | None
    num_pages: int
    error: str | None


def reshard(
    cache: DistributedKVCache | None,
    *,
    num_pages: int,
    group: Group = None,
    over: Group = None,
    device: torch.device | str = "cpu",
) -> DistributedKVCache | None:
    """Returns the cache over the ranks of another group, or balanced over the same ranks.

    The pages of each sequence are distributed round-robin. Sequences keep their numbers, and the pages that they share.
    Cached prefixes are not moved. The old cache does not change.

    Args:
        cache: the old cache; None on ranks that are not in its group.
        num_pages: pages per rank of the new cache.
        group: the ranks of the new cache; the result of dist.new_group on ranks that are not in it.
        over: a group of all old and new ranks, which call this together; None is the default group.
        device: of the new cache.
    Returns:
        The new cache; None on ranks that are not in `group`.
    Raises:
        ArgumentError: if no rank has a cache, or two ranks have different ones.
        OutOfPagesError: if the cache does not fit.
        DisagreementError: on CUDA, if an earlier decoding call has found a difference between the old ranks.
        All of them on every rank; the old cache does not change.
    Communication: each page in use that changes its rank, once; one all-gather of the page tables.
    """
    all_ranks = resolve_group(over)
    mesh = None if group == dist.GroupMember.NON_GROUP_MEMBER else rank_mesh(resolve_group(group))
    old_rank = None if cache is None else cache.mesh.rank
    own = _RankState(
        old_rank=old_rank,
        new_rank=None if mesh is None else mesh.rank,
        contents=(cache.spec, cache.pages) if cache is not None and old_rank == 0 else None,
        history=None if cache is None else cache.pages.history_digest,
        num_pages=num_pages,
        error=_pending_error(cache),
    )
    ranks: list[Any] = [own] * all_ranks.size()
    if all_ranks.size() > 1:
        dist.all_gather_object(ranks, own, group=all_ranks)
    spec, old_pages = _check_ranks(ranks)
    world_size = sum(rank.new_rank is not None for rank in ranks)
    pages, moves = old_pages.resharded(world_size, num_pages)
    target = None if mesh is None else DistributedKVCache.from_pages(spec, pages, mesh, torch.device(device))
    routes = _routes(ranks, moves)
    for layer in range(spec.num_layers):
        _move_layer(layer, all_ranks, routes, cache, target)
    return target


def _pending_error(cache: DistributedKVCache | None) -> str | None:
    """Returns the error that the old cache has still to raise, so that ranks without a cache raise it too."""
    try:
        if cache is not None:
            cache.mark_check.raise_pending()
    except DisagreementError as error:
        return str(error)
    return None


def _check_ranks(ranks: list[_RankState]) -> tuple[CacheSpec, PagePools]:
    """Returns spec and page tables of the old cache, if all ranks fit together."""
    for rank in ranks:
        if rank.error is not None:
            raise DisagreementError(rank.error)
    old = [rank for rank in ranks if rank.old_rank is not None]
    contents = [rank.contents for rank in ranks if rank.contents is not None]
    if len(contents) != 1 or len({rank.history for rank in old}) != 1:
        raise ArgumentError("cache: all ranks of one cache must pass it, in the same state, and all others None")
    world_size = contents[0][1].world_size
    if len(old) != world_size:
        raise ArgumentError(f"cache: {len(old)} of its {world_size} ranks are in the group `over`: all must be")
    if len({rank.num_pages for rank in ranks}) != 1:
        raise ArgumentError(f"num_pages: {[rank.num_pages for rank in ranks]}; must be the same on all ranks")
    return contents[0]


def _routes(ranks: list[_RankState], moves: tuple[PageMove, ...]) -> Routes:
    """Groups the moves by sender and receiver, numbered in the common group."""
    sender = {rank.old_rank: index for index, rank in enumerate(ranks)}
    receiver = {rank.new_rank: index for index, rank in enumerate(ranks)}
    routes: Routes = {}
    for move in moves:
        routes.setdefault((sender[move.from_rank], receiver[move.to_rank]), []).append(move)
    return routes


def _move_layer(
    layer: int,
    group: dist.ProcessGroup,
    routes: Routes,
    source: DistributedKVCache | None,
    target: DistributedKVCache | None,
) -> None:
    """Moves the pages of one layer, all at once; keys have tag 0, values tag 1."""
    own_rank = group.rank()
    sends: list[Message] = []
    receives: list[Message] = []
    writes: list[tuple[Tensor, list[PageMove], Tensor]] = []
    for (sender, receiver), moves in sorted(routes.items()):
        for tag in range(2):
            outgoing = None
            if sender == own_rank and source is not None:
                outgoing = source.storage(layer)[tag][[move.from_page for move in moves]]
                if receiver != own_rank:
                    sends.append(Message(outgoing, receiver, tag))
            if receiver == own_rank and target is not None:
                pool = target.storage(layer)[tag]
                incoming = pool.new_empty(len(moves), *pool.shape[1:]) if outgoing is None else outgoing
                if sender != own_rank:
                    receives.append(Message(incoming, sender, tag))
                writes.append((pool, moves, incoming))
    pending_sends, pending_receives = post(group, sends, receives)
    for message in (*pending_receives, *pending_sends):
        message.wait()
    for pool, moves, pages in writes:
        pool[[move.to_page for move in moves]] = pages
