#include "dispatch.h"

#include <torch/csrc/stable/library.h>

#include <vector>

namespace ringattn {

extern const KernelTable PORTABLE, EMULATED_BF16;
#if defined(__x86_64__)
extern const KernelTable AVX2, AVX512, AVX512_BF16;
#endif

namespace {

struct InstructionSet {
  const KernelTable* kernels;
  bool bf16_only;
  bool supported;  // by this processor

  bool takes(Dtype dtype) const { return supported && (dtype == Dtype::bfloat16 || !bf16_only); }
};

// Widest first.
std::vector<InstructionSet> all_instruction_sets() {
  std::vector<InstructionSet> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  sets.push_back({&AVX512_BF16, true, avx512 && __builtin_cpu_supports("avx512bf16")});
  sets.push_back({&AVX512, false, avx512});
  sets.push_back({&AVX2, false, avx2});
#endif
  sets.push_back({&PORTABLE, false, true});
  sets.push_back({&EMULATED_BF16, true, true});
  return sets;
}

}  // namespace

std::string instruction_sets(bool bf16) {
  std::string names;
  for (const InstructionSet& set : all_instruction_sets()) {
    if (!set.takes(bf16 ? Dtype::bfloat16 : Dtype::float32)) continue;
    if (!names.empty()) names += ",";
    names += set.kernels->name;
  }
  return names;
}

const KernelTable& select_kernels(const std::string& isa, Dtype dtype) {
  for (const InstructionSet& set : all_instruction_sets()) {
    if (set.takes(dtype) && (isa.empty() || isa == set.kernels->name)) return *set.kernels;
  }
  STD_TORCH_CHECK(false, "isa='", isa, "' does not run on this processor, or does not take this dtype");
}

}  // namespace ringattn
