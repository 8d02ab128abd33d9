"""Communication patterns: which rank needs which rows of which block.

Either side of attention can move, and an exchange need not know which. In the forward keys and values move to the
queries; in a prefill queries may move to the keys instead. In the backward keys and values move again, or the queries
move with everything that belongs to them. Blocks are named by the rank that holds them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ringattn.geometry.layout import Layout
from ringattn.geometry.masks import K_START, Q_START, Mask
from ringattn.geometry.rows import union_of
from ringattn.geometry.tiles import Tiles, needed_blocks, tiles_of_keys, tiles_of_rank
from ringattn.plan.comm_volume import rows_exchanged
from ringattn.plan.payload import Payload
from ringattn.types import Bools, Ints, Rows


@dataclass(frozen=True)
class CommPattern:
    """What moves under these masks and layouts.

    Args:
        moving: what moves.
        masks: one for all batch rows, or one for each.
        layout: which queries each rank holds.
        kv_layout: which keys and values each rank holds.
        mesh: the number of ranks along each axis, the slow one first; () is one axis.
    """

    moving: Payload
    masks: tuple[Mask, ...]
    layout: Layout
    kv_layout: Layout
    mesh: tuple[int, ...] = ()

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.layout.world_size

    @property
    def num_outer(self) -> int:
        """The number of ranks along the slow axis; 1 where there is one axis."""
        return self.mesh[0] if len(self.mesh) == 2 else 1

    @property
    def moves_queries(self) -> bool:
        """Whether queries move; otherwise keys and values do."""
        return self.moving.moves_queries

    @property
    def block_rows(self) -> tuple[int, ...]:
        """Rows of each rank's block."""
        held = self.layout if self.moves_queries else self.kv_layout
        return tuple(held.num_tokens(rank) for rank in range(self.world_size))

    @property
    def column(self) -> int:
        """The column of a tile table in which the moving rows begin."""
        return Q_START if self.moves_queries else K_START

    @property
    def needed(self) -> Bools:
        """Whether a rank needs anything of a block: (world, world) bool, [block, rank]."""
        found = needed_blocks(self.masks, self.layout, self.kv_layout)
        return found.T if self.moves_queries else found

    @property
    def rows_exchanged(self) -> tuple[Ints, Ints]:
        """How many rows each rank needs of other blocks, and others need of its block: two of (world,) int64."""
        return rows_exchanged(self.masks, self.layout, self.kv_layout, self.column)

    def tiles(self, rank: int) -> dict[int, Tiles]:
        """Returns rank's tiles against every block that it needs anything of."""
        of = tiles_of_keys if self.moves_queries else tiles_of_rank
        return of(self.masks, self.layout, self.kv_layout, rank)

    def rows_received(self, rank: int) -> dict[int, Rows]:
        """Returns which rows of every other block `rank` needs: the rows with an allowed pair."""
        return self._rows(self.tiles(rank), rank)

    def rows_sent(self, rank: int) -> dict[int, Rows]:
        """Returns which rows of rank's block every other rank needs."""
        of = tiles_of_rank if self.moves_queries else tiles_of_keys
        return self._rows(of(self.masks, self.layout, self.kv_layout, rank), rank)

    def _rows(self, tiles: dict[int, Tiles], rank: int) -> dict[int, Rows]:
        # Tiles are tight, so that each of their rows has a pair.
        column = self.column
        return {
            other: union_of(found.table[:, column], found.table[:, column + 1])
            for other, found in tiles.items()
            if other != rank
        }
