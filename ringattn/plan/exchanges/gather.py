"""Gather: each rank receives just the rows that it needs, from whoever holds them, and attends to them as they come.

With n stages, the rows that a rank needs of another come in n parts, each computed while the next is on its way; so
that a rank holds two of n parts at a time. Gradients go straight home, stage by stage, and are added there.

Source: the all-gather of Llama 3's context parallelism, Dubey et al. 2024, arXiv:2407.21783, less what is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ringattn.geometry.rows import split_rows
from ringattn.plan.comm_pattern import CommPattern
from ringattn.plan.exchanges.program_builder import ProgramBuilder
from ringattn.plan.plan import BlockSlice, Program
from ringattn.types import Rows


@dataclass(frozen=True)
class Gather:
    """Rows come straight from whoever holds them, in `stages` parts."""

    stages: int = 1

    @property
    def name(self) -> str:
        """For people."""
        return "gather" if self.stages == 1 else f"gather in {self.stages} stages"

    def program(self, travel: CommPattern, rank: int, backward: bool) -> Program:
        """Returns rank's steps; in the backward the gradients of what it received go back."""
        moves = bool(travel.needed.sum() > travel.needed.diagonal().sum())
        num_steps = 1 if not moves else self.stages + (2 if backward else 1)
        schedule = ProgramBuilder(travel, rank, num_steps)
        tiles, last, world = travel.tiles(rank), num_steps - 1, travel.world_size
        # In the backward the last rows' gradients go home under its second half.
        schedule.visit_own((0, last if backward else 0), tiles.get(rank))
        if not moves:
            return schedule.program()
        for source, pieces in _pieces(travel.rows_wanted(rank), lambda peer: (rank - peer) % world, self.stages):
            for stage, rows in pieces:
                piece = BlockSlice(source, rows)
                schedule.receive(stage, piece, of=source)
                schedule.visit(stage + 1, piece, tiles[source].select(rows, travel.column, renumber=True))
                if backward:
                    schedule.give_sum(stage + 2, piece, to=source, until=min(stage + 3, last))
        for peer, pieces in _pieces(travel.rows_given(rank), lambda peer: (peer - rank) % world, self.stages):
            for stage, rows in pieces:
                piece = BlockSlice(rank, rows)
                schedule.carry(stage, piece, to=peer, until=min(stage + 1, last))
                if backward:
                    schedule.take_sum(stage + 2, piece, of=peer, until=min(stage + 3, last))
        return schedule.program()

    def rows_moved(self, travel: CommPattern) -> tuple[int, int]:
        """Returns how many rows all ranks together send: of what is carried, and of its gradients."""
        moved = int(travel.rows_exchanged[0].sum())
        return moved, moved


def _pieces(
    rows: dict[int, Rows], distance: Callable[[int], int], stages: int
) -> Iterator[tuple[int, list[tuple[int, Rows]]]]:
    """Yields every other rank, the nearest first, and which rows come in which stage; a stage may have none."""
    for peer in sorted(rows, key=distance):
        yield peer, [(stage, part) for stage, part in enumerate(split_rows(rows[peer], stages)) if part]
