"""A block whose rows lie in several places: parts of it that follow one another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

from torch import Tensor

ROW_DIM = 2  # the dim of rows, of tensors (B, H, rows, ...)


class ChunkedRows:
    """Tensors (B, H, rows, ...) that belong together, in parts.

    Args:
        parts: of each, all tensors, with its rows: those of the block, one part after the other.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, ...]]) -> None:
        self.parts = tuple(parts)
        ends = accumulate((tensors[0].shape[ROW_DIM] for tensors in self.parts), initial=0)
        self._held = [range(*held) for held in pairwise(ends)]

    def cut(self, rows: Sequence[range] | None) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """Yields rows of the block in order, as far as they lie in one part: where they stand among `rows`, and views.

        Args:
            rows: ascending, of step 1; None is all.
        """
        start = 0
        for run in (range(self._held[-1].stop),) if rows is None else rows:
            for held, tensors in zip(self._held, self.parts, strict=True):
                first, last = max(run.start, held.start), min(run.stop, held.stop)
                if first < last:
                    here = slice(first - held.start, last - held.start)
                    at = start + first - run.start
                    yield slice(at, at + last - first), tuple(x[:, :, here] for x in tensors)
            start += len(run)

    def only(self, rows: Sequence[range] | None) -> tuple[Tensor, ...]:
        """Returns views of rows that lie in one part."""
        if rows is None and len(self.parts) == 1:
            return self.parts[0]
        ((_, views),) = self.cut(rows)
        return views
