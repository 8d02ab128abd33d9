// Vectors of 128 bits, which every 64-bit processor has: SSE2, NEON.
#define RINGATTN_ISA portable
#include "kernel_table.h"

namespace ringattn {
extern const Kernels PORTABLE;
const Kernels PORTABLE = portable::table<portable::Wide>("portable");
}  // namespace ringattn
