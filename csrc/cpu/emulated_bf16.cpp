// The arithmetic in pairs of bfloat16 in ordinary instructions: never chosen, but tests run it on any machine.
#define RINGATTN_ISA emulated_bf16
#define RINGATTN_BF16
#define RINGATTN_BF16_EMULATED
#include "kernel_table.h"

namespace ringattn {
extern const Kernels EMULATED_BF16;
const Kernels EMULATED_BF16 = emulated_bf16::table<emulated_bf16::Pairs>("emulated_bf16");
}  // namespace ringattn
