// 512-bit vectors: AVX-512 of Skylake servers and Zen 4.
#if defined(__x86_64__)
#define RINGATTN_ISA avx512
#define RINGATTN_X86
#define RINGATTN_AVX512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#include "kernel_table.h"

namespace ringattn {
extern const KernelTable AVX512;
const KernelTable AVX512 = avx512::make_kernel_table<avx512::Fp32Dot>("avx512");
}  // namespace ringattn
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
