"""Less memory outside attention: a chunked cross-entropy, and row-wise modules run over tiles of rows."""

from ringattn.memory.chunked_loss import chunked_cross_entropy
from ringattn.memory.tiled_mlp import tiled

__all__ = ["chunked_cross_entropy", "tiled"]
