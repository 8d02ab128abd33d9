"""A mask that a module outside the package registers, and nothing in the package knows."""

from __future__ import annotations

from ringattn import Mask
from ringattn.geometry.masks import MaskTerm, register_mask, slice_table
from ringattn.types import Ints


def _diagonal_slices(q_len: int, k_len: int, *offsets: int) -> Ints:
    return slice_table(*[(0, q_len, 0, k_len, offset, offset) for offset in offsets])


@register_mask(_diagonal_slices)
def diagonals(*offsets: int) -> Mask:
    """A query at q sees the keys at q + offset, for each of the offsets."""
    return Mask((MaskTerm("diagonals", tuple(sorted(set(offsets)))),))
