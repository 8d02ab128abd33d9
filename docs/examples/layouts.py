"""Layouts and plans are plain data: they can be looked at without any process group."""

from ringattn import balanced, causal, contiguous, documents, sliding_window, striped, zigzag
from ringattn.plan.exchanges import Gather, Ring, build_plan
from ringattn.plan.payload import Payload

assert contiguous(12, 2).ranges(1) == (range(6, 12),)
assert zigzag(12, 2).ranges(0) == (range(0, 3), range(9, 12))
assert striped(12, 2).positions(1).tolist() == [1, 3, 5, 7, 9, 11]
assert contiguous(13, 2).num_tokens(0) == 7  # nothing is padded: rank 0 has 7 positions, rank 1 has 6


def plan(mask, layout, exchange=Ring()):  # noqa: ANN001, ANN201, B008
    """The plan of self-attention under one mask, as rank 0 has it."""
    return build_plan(exchange, (mask,), layout, layout, rank=0)


# Work: causal attention is even under zigzag, and uneven under contiguous.
assert plan(causal(), zigzag(4096, 4)).imbalance < 0.001
assert plan(causal(), contiguous(4096, 4)).imbalance > 0.7

# Transfers: a narrow window under contiguous needs one neighbour; under zigzag, almost every rank.
window = sliding_window(100)
near = plan(window, contiguous(4096, 4))
far = plan(window, zigzag(4096, 4))
assert near.forward.rows_sent(Payload.KV) == 1024
assert far.forward.rows_sent(Payload.KV) == 3 * 1024

# A gather sends only the rows that somebody sees: the window's halo.
assert plan(window, contiguous(4096, 4), Gather()).forward.rows_sent(Payload.KV) == 100

# Packed documents of uneven lengths: `balanced` looks at the mask.
packed = documents([0, 2500, 2600, 3900, 4096]) & causal()
assert plan(packed, balanced(packed, 4096, 4)).imbalance < 0.02 < plan(packed, zigzag(4096, 4)).imbalance

print(plan(causal(), zigzag(4096, 4)).describe())
