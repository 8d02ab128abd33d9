"""A workload: one direction of an attention call over all ranks, and the compute and bytes that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ringattn.cost.cost_model import CostModel
from ringattn.geometry.layout import Layout
from ringattn.geometry.masks import K_START, Q_START, Mask
from ringattn.plan.comm_pattern import CommPattern
from ringattn.plan.comm_volume import pairs_of_ranks
from ringattn.plan.payload import AttentionShape
from ringattn.plan.plan import Phase
from ringattn.types import Floats, Ints


@dataclass(frozen=True)
class Workload:
    """One direction of a call.

    Args:
        masks: one for all batch rows, or one for each.
        layout: which queries each rank holds.
        kv_layout: which keys and values each rank holds.
        shape: of the tensors.
        phase: the direction, and what moves.
        wanted: whether gradients of (q, k or v) are wanted.
        mesh: the number of ranks along each axis, the slow one first.
    """

    masks: tuple[Mask, ...]
    layout: Layout
    kv_layout: Layout
    shape: AttentionShape
    phase: Phase
    wanted: tuple[bool, bool]
    mesh: tuple[int, ...]

    @property
    def pattern(self) -> CommPattern:
        """Which rank needs which rows of which block."""
        return CommPattern(self.phase.moving, self.masks, self.layout, self.kv_layout, self.mesh)

    @property
    def flops_of_ranks(self) -> Floats:
        """What each rank computes, (world,)."""
        staying = Q_START if self.pattern.column == K_START else K_START
        pairs = pairs_of_ranks(self.masks, self.layout, self.kv_layout, staying)
        return pairs.astype(np.float64) * (self.num_copies * self.flops_per_pair)

    @property
    def num_copies(self) -> int:
        """The number of batch rows that each mask stands for."""
        return self.shape.batch if len(self.masks) == 1 else 1

    @property
    def flops_per_pair(self) -> int:
        """The flops of one (query, key) pair over all heads."""
        return flops_per_pair(self.shape, backward=self.phase.is_backward)

    @property
    def block_rows(self) -> Ints:
        """Rows of each rank's block, (world,)."""
        return np.array(self.pattern.block_rows, dtype=np.int64)

    @property
    def staying_rows(self) -> Ints:
        """Rows of each rank on the side that does not move, (world,)."""
        held = self.layout if self.pattern.column == K_START else self.kv_layout
        return np.array([held.num_tokens(rank) for rank in range(held.world_size)], dtype=np.int64)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of what moves."""
        return self.shape.row_bytes(self.phase.moving)

    @property
    def returning_row_bytes(self) -> int:
        """Bytes of a row of what returns to the block's own rank; 0 if nothing does."""
        returning = self.phase.returning
        if returning is None or (self.phase.is_backward and not self.wanted[0 if self.pattern.moves_queries else 1]):
            return 0
        return self.shape.row_bytes(returning)

    def compute_s(self, model: CostModel, num_launches: Ints | Floats) -> Floats:
        """Returns the seconds that each rank computes, in so many kernel launches, (world,)."""
        compute = model.compute
        rate = compute.backward_flops_per_s if self.phase.is_backward else compute.flops_per_s
        found: Floats = self.flops_of_ranks / rate + num_launches * compute.launch_s
        return found


def flops_per_pair(shape: AttentionShape, *, backward: bool) -> int:
    """Returns the flops of one (query, key) pair over all heads: two products forward, five backward."""
    d, v = shape.head_dim, shape.v_head_dim
    return 2 * shape.heads * (3 * d + 2 * v if backward else d + v)
