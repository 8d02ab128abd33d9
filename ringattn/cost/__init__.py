"""Floor 2: what a plan takes: links, compute, lower bounds, choosing."""
