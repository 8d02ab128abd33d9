// 256-bit vectors: AVX2 with FMA and F16C.
#if defined(__x86_64__)
#define RINGATTN_ISA avx2
#define RINGATTN_X86
#define RINGATTN_AVX2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "kernel_table.h"

namespace ringattn {
extern const KernelTable AVX2;
const KernelTable AVX2 = avx2::make_kernel_table<avx2::Fp32Dot>("avx2");
}  // namespace ringattn
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
