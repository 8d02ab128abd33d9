// 128-bit vectors, which every 64-bit processor has: SSE2, NEON.
#define RINGATTN_ISA portable
#include "kernel_table.h"

namespace ringattn {
extern const KernelTable PORTABLE;
const KernelTable PORTABLE = portable::make_kernel_table<portable::Fp32Dot>("portable");
}  // namespace ringattn
