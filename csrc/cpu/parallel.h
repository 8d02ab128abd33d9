// Tasks on torch's threads.
#pragma once
#include <cstdint>
#include <functional>

namespace ringattn {

// Calls run(i, scratch) for tasks 0 to count - 1. A thread that has finished a task takes the next one. Each thread has
// its own scratch memory, of at least `scratch_bytes` bytes, aligned to 64 bytes.
void run_tasks(int64_t count, int64_t scratch_bytes, const std::function<void(int64_t, void*)>& run);

}  // namespace ringattn
