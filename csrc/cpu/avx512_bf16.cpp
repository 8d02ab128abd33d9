// 512-bit vectors with dot products of bf16 pairs: Cooper Lake, Sapphire Rapids, Zen 4.
#if defined(__x86_64__)
#define RINGATTN_ISA avx512_bf16
#define RINGATTN_X86
#define RINGATTN_AVX512
#define RINGATTN_BF16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif
#include "kernel_table.h"

namespace ringattn {
extern const KernelTable AVX512_BF16;
const KernelTable AVX512_BF16 = avx512_bf16::make_kernel_table<avx512_bf16::Bf16PairDot>("avx512_bf16");
}  // namespace ringattn
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
