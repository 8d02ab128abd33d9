// The arithmetic in pairs of bfloat16 in ordinary instructions: never chosen, but tests run it on any machine.
#define RINGATTN_ISA portable_bf16
#define RINGATTN_BF16
#define RINGATTN_BF16_EMULATED
#include "kernels.h"

namespace ringattn {
extern const Kernels PORTABLE_BF16;
const Kernels PORTABLE_BF16 = portable_bf16::table<portable_bf16::Pairs>("portable_bf16");
}  // namespace ringattn
