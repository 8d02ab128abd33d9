"""Bounds: what an exchange takes at least, from sums over each rank's work, bytes and hops, without a timetable.

No rank is through before it has computed and copied all that is its own, and before all that it sends has left; nor any
before the furthest block has made its way. The greatest of these is never more than what `simulation.py` finds, and of
thousands of ranks it is found in less than a second. Bytes, messages and buffers are what they are about.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ringattn.cost.cost_model import CostModel, Link
from ringattn.cost.spread_timetable import bytes_back, bytes_there
from ringattn.cost.timetables import Scene, flops_per_pair
from ringattn.geometry.masks import K_START
from ringattn.geometry.rows import count_rows, halves
from ringattn.plan.exchanges import Exchange, Gather, Ring
from ringattn.plan.exchanges.ring_schedule import RingSchedule
from ringattn.plan.head_parallel import gathered_layout, replicates_kv_heads
from ringattn.plan.head_shards import HeadShard, shard_heads
from ringattn.types import Floats, Ints


@dataclass(frozen=True, eq=False)
class LowerBound:
    """What one direction takes.

    Args:
        seconds: until all ranks are through, at least.
        flops: that each rank computes, (world,).
        busy: seconds that it computes and copies, at least, (world,).
        flow: seconds that the busiest rank's link is taken, at least.
        way: seconds until what goes furthest is there, at least.
        num_bytes, num_messages: that each rank sends, about, (world,); of a ring, all ranks the same.
        buffer_bytes: that the fullest rank holds, about.
    """

    seconds: float
    flops: Floats
    busy: Floats
    flow: float
    way: float
    num_bytes: Floats
    num_messages: Floats
    buffer_bytes: float


def lower_bound(exchange: Exchange, scene: Scene, model: CostModel) -> LowerBound:
    """Returns the bound of one direction of an exchange.

    Args:
        exchange: a Ring or a Gather.
        scene: the direction.
        model: links and compute.
    """
    if isinstance(exchange, Gather):
        return _gather(exchange.stages, scene, model)
    if isinstance(exchange, Ring):
        return _ring(exchange.num_outer, scene, model, model.links)
    raise TypeError(f"no bound is known for the exchange {exchange.name}")


def _ring(num_outer: int, scene: Scene, model: CostModel, links: tuple[Link, Link]) -> LowerBound:
    travel, backward = scene.travel, scene.phase.is_backward
    turns, rows = RingSchedule(travel, num_outer), np.array(scene.block_rows, dtype=np.int64)
    block, total = rows * scene.row_bytes, rows * scene.sum_row_bytes
    # Hops of each block, [block, turn]; and of its sum, which comes back at a turn's end, and home at last.
    hops, home = np.maximum(turns.reach, 0), turns.reach[:, 1:] >= 0
    sum_hops = np.where(turns.first <= turns.reach, turns.reach - turns.first + (turns.reach > 0), 0)
    crosses = turns.outer_reach > 0
    travels = (hops[:, 0] > 0) | crosses
    copied = block * travels + total * ((hops[:, 0] > 0) + home.sum(axis=1))
    busy = _compute_s(scene, model, travel.needed.sum(axis=0)) + copied / model.compute.copy_bytes_per_s
    # Along each axis the busiest rank sends no less than the average one.
    fast = (block * hops.sum(axis=1) + total * sum_hops.sum(axis=1)).mean()
    slow = (block * turns.outer_reach + total * home.sum(axis=1)).mean()
    flow = max(fast / links[0].bytes_per_s, slow / links[1].bytes_per_s)
    way = _longest_path(turns, _greater_halves(rows) * scene.row_bytes if backward else block, links)
    num_messages = hops.sum() + turns.outer_reach.sum()
    num_messages += sum_hops.sum() + home.sum() if scene.sum_row_bytes else 0
    # In the midst of a ring a rank holds two blocks; in a backward three halves, and two of sums.
    held = (1.5 * block + total if backward else 2.0 * block) * travels + 2.0 * block * crosses
    return LowerBound(
        max(float(busy.max()), flow, way),
        scene.flops_of_ranks,
        busy,
        flow,
        way,
        np.full(len(rows), fast + slow),
        np.full(len(rows), num_messages * (2 if backward else 1) / len(rows)),
        float(held.max()),
    )


def _longest_path(turns: RingSchedule, num_bytes: Ints, links: tuple[Link, Link]) -> float:
    """Seconds until the last of the blocks is where it is needed: one hop after the other, on both axes."""
    hop, leap = (link.latency_s + num_bytes / link.bytes_per_s for link in links)
    way = np.maximum(turns.reach, 0) * hop[:, None] + np.arange(turns.num_outer) * leap[:, None]
    return float(np.where((turns.reach >= 0) & (num_bytes > 0)[:, None], way, 0.0).max())


def _gather(stages: int, scene: Scene, model: CostModel) -> LowerBound:
    link, compute, needed = model.link, model.compute, scene.travel.needed
    rows, own = np.array(scene.block_rows, dtype=np.int64), needed.diagonal()
    takes, gives = scene.travel.rows_exchanged
    taken, given = (
        _parts(number, needed.sum(axis=axis) - own, int(rows.max()), stages)
        for number, axis in ((takes, 0), (gives, 1))
    )
    working = _compute_s(scene, model, taken + own)
    busy = working + gives * scene.sum_row_bytes / compute.copy_bytes_per_s
    coming = takes * scene.row_bytes + gives * scene.sum_row_bytes
    going = gives * scene.row_bytes + takes * scene.sum_row_bytes
    flow = np.maximum(coming, going) / link.bytes_per_s
    way = (takes > 0) * link.latency_s + takes * scene.row_bytes / link.bytes_per_s
    if scene.sum_row_bytes:
        # The last sums set out when all but half of the own block, of which this is the whole, is computed.
        late = rows * _staying_rows(scene) * (scene.sizes.batch * flops_per_pair(scene.sizes, scene.phase))
        early = working - late / compute.backward_flops_per_s - own * compute.launch_s
        last = takes * scene.sum_row_bytes / stages
        way = np.maximum(early, way) + (takes > 0) * link.latency_s + last / link.bytes_per_s
    share = min(1.0, 2.0 / stages)
    here = share * takes * scene.row_bytes + np.minimum(gives, -(-rows // stages)) * scene.row_bytes
    sums = share * gives * scene.sum_row_bytes
    held = here + sums if stages > 1 else np.maximum(here, sums)
    return LowerBound(
        float(np.maximum.reduce([busy, flow, way]).max()),
        scene.flops_of_ranks,
        busy,
        float(flow.max()),
        float(way.max()),
        going.astype(np.float64),
        given + (taken if scene.sum_row_bytes else 0.0),
        float(held.max()),
    )


def _parts(num_rows: Ints, pieces: Ints, block: int, stages: int) -> Floats:
    """In how many parts so many rows come at least: of a piece, one a stage, or a row; fewest if of whole blocks."""
    a_row = (min(stages, block) - 1) / max(block - 1, 1)
    found: Floats = pieces + (num_rows - pieces) * a_row
    return found


def ulysses_lower_bound(exchange: Ring, scene: Scene, model: CostModel, num_groups: int, stages: int) -> LowerBound:
    """Returns the bound of one direction of heads spread within groups, with a ring between the groups.

    Args:
        exchange: between the groups.
        scene: the direction, of all ranks.
        model: links and compute.
        num_groups: 1 if all ranks make one group.
        stages: parts of each rank's heads.
    """
    world, link, copies = scene.layout.world_size, model.link, model.compute.copy_bytes_per_s
    all_shares = shard_heads(scene.sizes.heads, scene.sizes.kv_heads, world // num_groups, stages)
    layout, kv_layout = gathered_layout(scene.layout, num_groups)[0], gathered_layout(scene.kv_layout, num_groups)[0]
    inner = replace(scene, layout=layout, kv_layout=kv_layout)
    there, back = bytes_there(scene), bytes_back(scene, replicates_kv_heads(all_shares))
    sent, received = np.zeros((num_groups, len(all_shares[0]))), np.zeros((num_groups, len(all_shares[0])))
    flops, busy, ring_bytes, num_messages = (np.zeros_like(sent) for _ in range(4))
    begun, flow, way, held = np.zeros_like(sent), 0.0, 0.0, 0.0
    for stage, shares in enumerate(all_shares):
        out, come = _all_to_all_bytes(scene, num_groups, shares, there)
        come_back, out_back = _all_to_all_bytes(scene, num_groups, shares, back)
        sent, received = sent + out + out_back, received + come + come_back
        num_messages += ((out > 0) + (out_back > 0)) * (len(shares) - 1)
        begun = begun if stage else _transfer_s(come, link)
        ended = np.maximum(_transfer_s(out_back, link), _transfer_s(come_back, link))
        between = _inner_bounds(exchange, inner, model, shares)
        for place, found in enumerate(between):
            flops[:, place] += found.flops
            busy[:, place] += found.busy
            ring_bytes[:, place] += found.num_bytes
            num_messages[:, place] += found.num_messages
        # Any place makes a bound; the first has the most heads.
        flow, way = flow + between[0].flow, max(way, between[0].way)
        held = max(held, float((out + come).max()) * min(stages, 2) + between[0].buffer_bytes)
    busy += (sent + received) / copies
    seconds = max(
        float((begun + busy + ended).max()),
        float(np.maximum(sent, received).max()) / link.bytes_per_s,
        float(begun.min()) + max(flow, way) + float(ended.min()),
    )
    amounts = (sent + ring_bytes).ravel(), num_messages.ravel(), held
    return LowerBound(seconds, flops.ravel(), busy.ravel(), flow, way, *amounts)


def _inner_bounds(exchange: Ring, inner: Scene, model: CostModel, shares: tuple[HeadShard, ...]) -> list[LowerBound]:
    """The bounds of what the ranks at each place of the groups do among themselves, on the slow axis."""
    slow = model.links[1]
    found: dict[tuple[int, int], LowerBound] = {}
    counts = [(len(share.heads), len(share.kv_heads)) for share in shares]
    for heads in dict.fromkeys(counts):
        if heads[0]:
            part = replace(inner, sizes=inner.sizes.of_heads(*heads))
            found[heads] = _ring(exchange.num_outer, part, model, (slow, slow))
        else:
            nothing = np.zeros(inner.layout.world_size)
            found[heads] = LowerBound(0.0, nothing, nothing, 0.0, 0.0, nothing, nothing, 0.0)
    return [found[heads] for heads in counts]


def _all_to_all_bytes(
    scene: Scene, num_groups: int, shares: tuple[HeadShard, ...], row_bytes: tuple[int, int]
) -> tuple[Floats, Floats]:
    """Bytes that each rank sends and receives where rows go to those who have the heads, (groups, places)."""
    out, come = np.zeros((2, num_groups, len(shares)))
    heads = [len(share.heads) for share in shares], [len(share.kv_heads) for share in shares]
    for held, numbers, num_bytes in zip((scene.layout, scene.kv_layout), heads, row_bytes, strict=True):
        rows = np.array([held.num_tokens(rank) for rank in range(held.world_size)]).reshape(num_groups, -1)
        number = np.array(numbers)
        out += rows * (number.sum() - number) * (scene.sizes.batch * num_bytes)
        come += (rows.sum(axis=1, keepdims=True) - rows) * number * (scene.sizes.batch * num_bytes)
    return out, come


def _transfer_s(num_bytes: Floats, link: Link) -> Floats:
    found: Floats = num_bytes / link.bytes_per_s + (num_bytes > 0) * link.latency_s
    return found


def _compute_s(scene: Scene, model: CostModel, num_visits: Ints | Floats) -> Floats:
    """Seconds that each rank computes, in so many visits."""
    compute = model.compute
    rate = compute.backward_flops_per_s if scene.phase.is_backward else compute.flops_per_s
    found: Floats = scene.flops_of_ranks / rate + num_visits * compute.launch_s
    return found


def _greater_halves(rows: Ints) -> Ints:
    different, index = np.unique(rows, return_inverse=True)
    found: Ints = np.array([max(map(count_rows, halves(n))) for n in different.tolist()], dtype=np.int64)[index]
    return found


def _staying_rows(scene: Scene) -> Ints:
    """Rows of each rank on the side that does not travel."""
    held = scene.layout if scene.travel.column == K_START else scene.kv_layout
    return np.array([held.num_tokens(rank) for rank in range(held.world_size)], dtype=np.int64)
