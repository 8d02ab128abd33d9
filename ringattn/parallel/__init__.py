"""Floor 5: training on every axis at once. Context parallelism inside torch's own engine, one file for each axis."""
