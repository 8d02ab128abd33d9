// Emulates avx512_bf16 with ordinary instructions, so that tests can run on any machine. Never selected by default.
#define RINGATTN_ISA emulated_bf16
#define RINGATTN_BF16
#define RINGATTN_BF16_EMULATED
#include "kernel_table.h"

namespace ringattn {
extern const KernelTable EMULATED_BF16;
const KernelTable EMULATED_BF16 = emulated_bf16::make_kernel_table<emulated_bf16::Bf16PairDot>("emulated_bf16");
}  // namespace ringattn
