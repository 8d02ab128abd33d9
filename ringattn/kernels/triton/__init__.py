"""Triton kernels. Triton itself is imported when a kernel first runs."""
