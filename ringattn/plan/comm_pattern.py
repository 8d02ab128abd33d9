"""Travel: who needs what of whom. Either side of attention can travel, and a builder need not know which.

In the forward keys and values travel to the queries. In the backward they do so again; or the queries travel, with
all that belongs to them, and keys and values stay where they are. Blocks are named by the rank they belong to.
"""

from __future__ import annotations

from dataclasses import dataclass

from ringattn.geometry.layout import Layout
from ringattn.geometry.masks import K_START, Q_START, Mask
from ringattn.geometry.rows import union_of
from ringattn.geometry.tiles import Tiles, needed_blocks, tiles_of_keys, tiles_of_rank
from ringattn.plan.comm_volume import rows_exchanged, rows_needed
from ringattn.plan.payload import Payload
from ringattn.types import Bools, Ints, Rows


@dataclass(frozen=True)
class CommPattern:
    """What travels under these masks and layouts.

    Args:
        carried: KV or Q.
        masks: one for all batch rows, or one for each.
        layout: who holds which queries.
        kv_layout: who holds which keys and values.
    """

    carried: Payload
    masks: tuple[Mask, ...]
    layout: Layout
    kv_layout: Layout

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self.layout.world_size

    @property
    def block_rows(self) -> tuple[int, ...]:
        """Rows of each rank's block."""
        held = self.kv_layout if self.carried is Payload.KV else self.layout
        return tuple(held.num_tokens(rank) for rank in range(self.world_size))

    @property
    def column(self) -> int:
        """Where the rows of what travels begin in a table of tiles."""
        return K_START if self.carried is Payload.KV else Q_START

    @property
    def needed(self) -> Bools:
        """Who needs whose block: (world, world) bool, [block, rank]."""
        found = needed_blocks(self.masks, self.layout, self.kv_layout)
        return found if self.carried is Payload.KV else found.T

    @property
    def rows_needed(self) -> Ints:
        """How many rows of whose block a rank needs: (world, world) int64, [block, rank]."""
        return rows_needed(self.masks, self.layout, self.kv_layout, self.column)

    @property
    def rows_exchanged(self) -> tuple[Ints, Ints]:
        """How many rows each rank needs of others, and they of its block: two of (world,) int64."""
        return rows_exchanged(self.masks, self.layout, self.kv_layout, self.column)

    def tiles(self, rank: int) -> dict[int, Tiles]:
        """Returns rank's tiles against every block that it needs anything of."""
        of = tiles_of_rank if self.carried is Payload.KV else tiles_of_keys
        return of(self.masks, self.layout, self.kv_layout, rank)

    def rows_wanted(self, rank: int) -> dict[int, Rows]:
        """Returns which rows of every other block `rank` needs: just those with an allowed pair in it."""
        return self._rows(self.tiles(rank), rank)

    def rows_given(self, rank: int) -> dict[int, Rows]:
        """Returns which rows of rank's block every other rank needs."""
        of = tiles_of_keys if self.carried is Payload.KV else tiles_of_rank
        return self._rows(of(self.masks, self.layout, self.kv_layout, rank), rank)

    def _rows(self, tiles: dict[int, Tiles], rank: int) -> dict[int, Rows]:
        # Tiles are tight, so that each of their rows has a pair.
        column = self.column
        return {
            other: union_of(found.table[:, column], found.table[:, column + 1])
            for other, found in tiles.items()
            if other != rank
        }
