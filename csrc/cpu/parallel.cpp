#include "parallel.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

namespace ringattn {
namespace {

// Memory that the calling thread keeps for its next call, since page faults of new memory take longer than a small
// call.
void* cached_memory(size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local size_t size = 0;
#if defined(__SANITIZE_ADDRESS__)
  size = 0;  // new memory for each call, so that the sanitizer finds stale reads and overruns
#endif
  if (size < bytes) {
    memory.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    size = memory ? bytes : 0;
    if (!memory) throw std::bad_alloc();
  }
  return memory.get();
}

}  // namespace

void run_tasks(int64_t count, int64_t scratch_bytes, const std::function<void(int64_t, void*)>& run) {
  const int64_t workers = std::min<int64_t>(count, torch::stable::get_num_threads());
  if (workers == 0) return;
  // 64 bytes beyond a whole page: the same buffer of two threads does not fall into the same cache sets.
  const int64_t pitch = (scratch_bytes + 4095) / 4096 * 4096 + 64;
  char* memory = static_cast<char*>(cached_memory(workers * pitch));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t i = next++; i < count; i = next++) run(i, memory + worker * pitch);
    }
  });
}

}  // namespace ringattn
