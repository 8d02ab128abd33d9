"""What one rank gets wrong, all ranks raise."""

import torch
import torch.distributed as dist

from ringattn import BackendError, DisagreementError, LayoutError, contiguous, ring_attention, zigzag

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
x = torch.randn(1, 10, 2, 8)


def message(kind: type[Exception], **options: object) -> str:
    """What ring_attention says when it raises as it should."""
    try:
        ring_attention(x, x, x, **options)
    except ValueError as error:  # all of them are
        if isinstance(error, kind):
            return str(error)
        raise
    raise AssertionError(f"expected {kind.__name__}")


# The layout gives rank 1 one row less than it has: rank 0 is told, too, and names it.
told = message(LayoutError, layout=contiguous(10 * world - 1, world))
assert f"rank {world - 1}" in told

# The ranks mean different things.
told = message(DisagreementError, layout=(contiguous if rank == 0 else zigzag)(10 * world, world))
assert "disagree on layout" in told

# A backend that is asked for runs, or says why it cannot. It is never replaced by another.
told = message(BackendError, backend="sdpa", softcap=30.0)
assert "has no softcap" in told
assert ring_attention(x, x, x, softcap=30.0).isfinite().all()  # backend=None takes the first that can
dist.destroy_process_group()
