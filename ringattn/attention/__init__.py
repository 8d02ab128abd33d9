"""Floor 3: plan + kernels + comm = the public operations."""
