// The table of one instruction set's kernels. Included by one source file for each, which names the set.
#pragma once
#include "backward.h"
#include "decode.h"
#include "forward.h"

namespace ringattn::RINGATTN_ISA {

template <class Arithmetic>
constexpr Kernels table(const char* name) {
  return {
      name,
      BLOCK,
      &Forward<Arithmetic>::blocks_per_task,
      &Forward<Arithmetic>::scratch,
      [](const Problem& p, const ForwardTask& task, void* memory) { Forward<Arithmetic>(p, task, memory).run(); },
      &Backward<Arithmetic>::scratch,
      [](const Problem& p, const BackwardTask& task, void* memory) { Backward<Arithmetic>(p, task, memory).run(); },
      [](const DecodeProblem& p) { return decode_scratch(p); },
      [](const DecodeProblem& p, const DecodeTask& task, void* memory) { decode(p, task, memory); },
  };
}

}  // namespace ringattn::RINGATTN_ISA
