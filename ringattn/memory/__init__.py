"""Memory around attention: what runs out first when sequences are long and attention is sharded."""

from ringattn.memory.chunked_loss import chunked_cross_entropy
from ringattn.memory.tiled_mlp import tiled

__all__ = ["chunked_cross_entropy", "tiled"]
