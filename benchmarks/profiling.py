"""Peak memory and the time of copies, by torch's allocator and profiler."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.internals import empty_buffer_pools

# Operators that only copy numbers; torch's other copying functions call one of these.
_COPIES = ("aten::copy_", "aten::cat", "aten::index", "aten::index_select", "aten::index_copy_")


def peak_bytes(work: Callable[[], object]) -> int:
    """Returns the most memory that `work` held at once beyond what was allocated before, message buffers included.

    On CUDA it is the allocator's own peak; on CPU it is summed up from the profiler's allocation events.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with empty_buffer_pools(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def copying_seconds(work: Callable[[], object]) -> float:
    """Returns how long `work` copies tensors: time of the GPU where there is one, else of the CPU."""
    on_gpu = torch.cuda.is_available()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA] if on_gpu else [kinds.CPU]) as profile:
        work()
    events = [event for event in profile.key_averages() if event.key in _COPIES]
    return sum(float(event.self_device_time_total if on_gpu else event.self_cpu_time_total) for event in events) / 1e6
