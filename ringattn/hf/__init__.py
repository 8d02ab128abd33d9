"""Floor 5: Hugging Face transformers: any model's attention over a sequence that the ranks of a group share.

    import ringattn.hf as rhf

    with rhf.patch(model, group) as handle:
        share = handle.shard(batch)
        loss = model(**share).loss

Importing it registers the attention implementation "ringattn" with transformers, and nothing else: what a call is to
do, it is told by the batch that comes with it.
"""

from ringattn.hf.accelerate_config import RingParallelism
from ringattn.hf.attention_call import ForwardContext, LayerCall
from ringattn.hf.attention_interface import register
from ringattn.hf.handle import Handle
from ringattn.hf.mask_patterns import MaskPattern
from ringattn.hf.patching import patch
from ringattn.hf.ring_cache import RingCache
from ringattn.hf.sequence_batch import SequenceRows, ShardingContext
from ringattn.hf.trainer import RingMixin, RingTrainer

register()

__all__ = [
    "ForwardContext",
    "Handle",
    "LayerCall",
    "MaskPattern",
    "RingCache",
    "RingMixin",
    "RingParallelism",
    "RingTrainer",
    "SequenceRows",
    "ShardingContext",
    "patch",
]
