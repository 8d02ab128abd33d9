"""Floor 2: moving tensors between the ranks of one group. Knows nothing of attention."""
