"""Floor 6: Hugging Face transformers: any model's attention over the ranks of a group, for training and generation.

    import ringattn.hf as rhf

    with rhf.patch(model, group) as handle:
        local_batch = handle.shard(batch)
        loss = model(**local_batch).loss

The import registers the attention implementation "ringattn" with transformers, and changes nothing else. The sharded
batch carries a context through the model's arguments to the attention layers; there is no global state.
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
