"""Floor 4: plan + kernels + comm = the public operations."""
