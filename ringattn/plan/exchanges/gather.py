"""Gather: each rank receives exactly the rows that it needs, from the ranks that hold them.

With n stages, the rows that a rank needs of another arrive in n parts, each computed while the next is under way, so
that a rank holds two of n parts at a time. Returns go straight back, stage by stage, and are accumulated there.

Source: the all-gather of Llama 3's context parallelism, Dubey et al. 2024, arXiv:2407.21783, without the rows that are
not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ringattn.cost.cost_model import CostModel
from ringattn.cost.lower_bound import LowerBound, transfer_s
from ringattn.errors import check_integer
from ringattn.geometry.rows import split_rows
from ringattn.plan.comm_pattern import CommPattern
from ringattn.plan.exchanges.exchange import Exchange, register_exchange_class
from ringattn.plan.exchanges.program_builder import ProgramBuilder
from ringattn.plan.plan import BlockSlice, Program
from ringattn.plan.workload import Workload
from ringattn.types import Floats, Ints, Rows


@register_exchange_class
@dataclass(frozen=True, repr=False)
class Gather(Exchange):
    """Rows come straight from the ranks that hold them.

    Args:
        stages: the number of parts in which they come, 1 or more.
    """

    stages: int = 1

    def __post_init__(self) -> None:
        check_integer("stages", self.stages, 1)
        super().__post_init__()

    @property
    def name(self) -> str:
        """What people call it."""
        return "gather" if self.stages == 1 else f"gather in {self.stages} stages"

    def program(self, pattern: CommPattern, rank: int, *, returns: bool) -> Program:
        """Returns rank's steps; with `returns`, what it computed for received rows goes back."""
        moves = bool(pattern.needed.sum() > pattern.needed.diagonal().sum())
        num_steps = 1 if not moves else self.stages + (2 if returns else 1)
        builder = ProgramBuilder(pattern, rank, num_steps)
        tiles, last, world = pattern.tiles(rank), num_steps - 1, pattern.world_size
        # The returns of the last rows travel while the second half of the own block is computed.
        builder.compute_own((0, last if returns else 0), tiles.get(rank))
        if not moves:
            return builder.program()
        for source, parts in _parts(pattern.rows_received(rank), lambda peer: (rank - peer) % world, self.stages):
            for stage, rows in parts:
                block_slice = BlockSlice(source, rows)
                builder.receive(stage, block_slice, source=source)
                builder.compute(stage + 1, block_slice, tiles[source].select(rows, pattern.column, renumber=True))
                if returns:
                    builder.send_return(stage + 2, block_slice, to=source, until=min(stage + 3, last))
        for peer, parts in _parts(pattern.rows_sent(rank), lambda peer: (peer - rank) % world, self.stages):
            for stage, rows in parts:
                block_slice = BlockSlice(rank, rows)
                builder.send(stage, block_slice, to=peer, until=min(stage + 1, last))
                if returns:
                    builder.receive_return(stage + 2, block_slice, source=peer, until=min(stage + 3, last))
        return builder.program()

    def rows_moved(self, pattern: CommPattern) -> tuple[int, int]:
        """Returns how many rows all ranks together send: of what moves, and of what returns."""
        moved = int(pattern.rows_exchanged[0].sum())
        return moved, moved

    def lower_bound(self, workload: Workload, model: CostModel) -> LowerBound:
        """Returns the least time: busy ranks, busy links, and the last rows' way there and back."""
        link, compute, needed = model.link, model.compute, workload.pattern.needed
        rows, own = workload.block_rows, needed.diagonal()
        received, sent = workload.pattern.rows_exchanged
        parts_received, parts_sent = (
            self._num_parts(number, needed.sum(axis=axis) - own, int(rows.max()))
            for number, axis in ((received, 0), (sent, 1))
        )
        row_bytes, returning = workload.row_bytes, workload.returning_row_bytes
        compute_s = workload.compute_s(model, parts_received + own)
        busy_s = compute_s + sent * returning / compute.copy_bytes_per_s
        incoming, outgoing = received * row_bytes + sent * returning, sent * row_bytes + received * returning
        link_s = np.maximum(incoming, outgoing) / link.bytes_per_s
        path_s = transfer_s(received * row_bytes, link)
        if returning:
            # The last returns leave when everything but half of the own block (bounded by all of it) is computed.
            late = rows * workload.staying_rows * (workload.shape.batch * workload.flops_per_pair)
            early = compute_s - late / compute.backward_flops_per_s - own * compute.launch_s
            path_s = np.maximum(early, path_s) + transfer_s(received * returning / self.stages, link)
        share = min(1.0, 2.0 / self.stages)
        here = share * received * row_bytes + np.minimum(sent, -(-rows // self.stages)) * row_bytes
        sums = share * sent * returning
        held = here + sums if self.stages > 1 else np.maximum(here, sums)
        return LowerBound(
            float(np.maximum.reduce([busy_s, link_s, path_s]).max()),
            workload.flops_of_ranks,
            busy_s,
            float(link_s.max()),
            float(path_s.max()),
            outgoing.astype(np.float64),
            parts_sent + (parts_received if returning else 0.0),
            float(held.max()),
        )

    def _num_parts(self, num_rows: Ints, num_blocks: Ints, block_rows: int) -> Floats:
        """Returns in how many parts rows arrive at least: of each block one a stage, or one a row."""
        per_row = (min(self.stages, block_rows) - 1) / max(block_rows - 1, 1)
        found: Floats = num_blocks + (num_rows - num_blocks) * per_row
        return found


def _parts(
    rows: dict[int, Rows], distance: Callable[[int], int], stages: int
) -> Iterator[tuple[int, list[tuple[int, Rows]]]]:
    """Yields every other rank, the nearest first, and which rows come in which stage; a stage may have none."""
    for peer in sorted(rows, key=distance):
        yield peer, [(stage, part) for stage, part in enumerate(split_rows(rows[peer], stages)) if part]
