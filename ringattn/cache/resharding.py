"""Moving a cache, as it is, to other ranks."""

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


class _Note(NamedTuple):
    """What a rank tells all others: its rank before and after, and what it holds."""

    before: int | None
    after: int | None
    held: tuple[CacheSpec, PagePools] | None
    digest: int | None
    num_pages: int
    unsettled: str | None  # what the ranks of its cache were found to disagree on


def reshard(
    cache: DistributedKVCache | None,
    *,
    num_pages: int,
    group: Group = None,
    over: Group = None,
    device: torch.device | str = "cpu",
) -> DistributedKVCache | None:
    """Returns the same cache over the ranks of another group, or over the same ones more evenly.

    The pages of each sequence are dealt in turn. Sequences keep their names, and what they share; what `remember` was
    told is forgotten. The old cache is not changed.

    Args:
        cache: the old one; None on ranks that have no part in it.
        num_pages: pages of each rank of the new one.
        group: the new one's ranks; what dist.new_group returned on those that are not in it.
        over: a group of all ranks, old and new, which call this together; None is the default group.
        device: where the new cache is.
    Returns:
        The new cache; None on ranks that are not in `group`.
    Raises:
        ArgumentError: when nobody has a cache, or two ranks have different ones; OutOfPagesError when it does not
            fit; DisagreementError, on CUDA, when the old one's ranks have disagreed in what was decoded last. On every
            rank; the old cache is as it was.
    Communication: each page in use that changes its rank, once.
    """
    all_ranks = resolve_group(over)
    team = None if group == dist.GroupMember.NON_GROUP_MEMBER else rank_mesh(resolve_group(group))
    before = None if cache is None else cache.team.rank
    held = (cache.form, cache.pages) if cache is not None and before == 0 else None
    digest = None if cache is None else cache.pages.digest
    notes: list[Any] = [None] * all_ranks.size()
    own = _Note(before, None if team is None else team.rank, held, digest, num_pages, _unsettled(cache))
    dist.all_gather_object(notes, own, group=all_ranks)
    form, old = _held(notes)
    world = sum(note.after is not None for note in notes)
    pages, moves = old.resharded(world, num_pages)
    made = None if team is None else DistributedKVCache.of(form, pages, team, torch.device(device))
    routes = _routes(notes, moves)
    for layer in range(form.num_layers):
        _move(layer, all_ranks, routes, cache, made)
    return made


def _unsettled(cache: DistributedKVCache | None) -> str | None:
    """Returns what is still to be raised: on all ranks then, those that have no cache among them."""
    try:
        if cache is not None:
            cache.agreement.settle()
    except DisagreementError as error:
        return str(error)
    return None


def _held(notes: list[_Note]) -> tuple[CacheSpec, PagePools]:
    for note in notes:
        if note.unsettled is not None:
            raise DisagreementError(note.unsettled)
    holders = [note for note in notes if note.before is not None]
    found = [note.held for note in notes if note.held is not None]
    if len(found) != 1 or len({note.digest for note in holders}) != 1:
        raise ArgumentError("cache: all ranks of one cache must give it, in the same state, and all others None")
    if len(holders) != found[0][1].world_size:
        raise ArgumentError(f"cache: {len(holders)} of its {found[0][1].world_size} ranks are there: all must be")
    if len({note.num_pages for note in notes}) != 1:
        raise ArgumentError(f"num_pages: {[note.num_pages for note in notes]}; must be the same on all ranks")
    return found[0]


def _routes(notes: list[_Note], moves: tuple[PageMove, ...]) -> dict[tuple[int, int], list[PageMove]]:
    """Returns which pages go from which rank of all to which."""
    sender = {note.before: rank for rank, note in enumerate(notes)}
    receiver = {note.after: rank for rank, note in enumerate(notes)}
    routes: dict[tuple[int, int], list[PageMove]] = {}
    for move in moves:
        routes.setdefault((sender[move.from_rank], receiver[move.to_rank]), []).append(move)
    return routes


def _move(
    layer: int,
    group: dist.ProcessGroup,
    routes: dict[tuple[int, int], list[PageMove]],
    cache: DistributedKVCache | None,
    made: DistributedKVCache | None,
) -> None:
    """Sends one layer's pages on their ways, all at once."""
    me = group.rank()
    sends: list[Message] = []
    receives: list[Message] = []
    landing: list[tuple[Tensor, list[PageMove], Tensor]] = []
    for (sender, receiver), moves in sorted(routes.items()):
        for tag in range(2):
            leaving = None
            if sender == me and cache is not None:
                leaving = cache.storage(layer)[tag][[move.from_page for move in moves]]
                if receiver != me:
                    sends.append(Message(leaving, receiver, tag))
            if receiver == me and made is not None:
                pool = made.storage(layer)[tag]
                coming = pool.new_empty(len(moves), *pool.shape[1:]) if leaving is None else leaving
                if sender != me:
                    receives.append(Message(coming, sender, tag))
                landing.append((pool, moves, coming))
    sent, received = post(group, sends, receives)
    for flight in (*received, *sent):
        flight.wait()
    for pool, moves, pages in landing:
        pool[[move.to_page for move in moves]] = pages
