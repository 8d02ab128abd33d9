// The kernel table of one instruction set. Each instruction set's source file defines RINGATTN_ISA and includes this.
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
      &ForwardKernel<Dot>::blocks_per_task,
      &ForwardKernel<Dot>::scratch,
      [](const AttentionParams& p, const ForwardTask& task, void* memory) {
        ForwardKernel<Dot>(p, task, memory).run();
      },
      &BackwardKernel<Dot>::scratch,
      [](const AttentionParams& p, const BackwardTask& task, void* memory) {
        BackwardKernel<Dot>(p, task, memory).run();
      },
      [](const DecodeParams& p) { return decode_scratch(p); },
      [](const DecodeParams& p, const DecodeTask& task, void* memory) { decode(p, task, memory); },
  };
}

}  // namespace ringattn::RINGATTN_ISA
