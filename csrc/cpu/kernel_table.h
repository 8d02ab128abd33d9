// The table of one instruction set's kernels. Included by one source file for each, which names the set.
#pragma once
#include "backward.h"
#include "decode.h"
#include "forward.h"

namespace ringattn::RINGATTN_ISA {

template <class Dot>
constexpr KernelTable make_kernel_table(const char* name) {
  return {
      name,
      BLOCK_M,
      &Forward<Dot>::blocks_per_task,
      &Forward<Dot>::scratch,
      [](const AttentionParams& p, const ForwardTask& task, void* memory) { Forward<Dot>(p, task, memory).run(); },
      &Backward<Dot>::scratch,
      [](const AttentionParams& p, const BackwardTask& task, void* memory) { Backward<Dot>(p, task, memory).run(); },
      [](const DecodeParams& p) { return decode_scratch(p); },
      [](const DecodeParams& p, const DecodeTask& task, void* memory) { decode(p, task, memory); },
  };
}

}  // namespace ringattn::RINGATTN_ISA
