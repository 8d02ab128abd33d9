"""Floor 5: the distributed KV cache, and attention to it in prefill and decoding."""
