// Selection of an instruction set's kernels when the program runs.
#pragma once
#include <string>

#include "params.h"

namespace ringattn {

// The names of the instruction sets that this processor has and that take the dtype, separated by commas. The first one
// is the default.
std::string instruction_sets(bool bf16);

// The kernels of the instruction set `isa`, or of the default one if `isa` is empty.
// Throws if `isa` is not one of instruction_sets.
const KernelTable& select_kernels(const std::string& isa, Dtype dtype);

}  // namespace ringattn
