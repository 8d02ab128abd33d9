"""The kernels on a processor that is not this one."""
