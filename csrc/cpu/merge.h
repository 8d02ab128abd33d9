// Merging partial attention results by their log-sum-exp.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace ringattn {

// Merges a partial result of one row into its state: out (dim) and *lse.
void merge_row(float* out, float* lse, const float* part, float part_lse, int64_t dim);

// The op `merge`: out (batch, rows, heads, dim) is the sum of outs (parts, batch, rows, heads, dim), weighted by
// the softmax of lses (parts, batch, heads, rows) over parts. The sum adds up parts 1 to `first`, then part 0, and then
// the remaining parts. sink: (heads), logits that take part in the softmax without a value.
void merge(const torch::stable::Tensor& outs, const torch::stable::Tensor& lses, int64_t first,
           const std::optional<torch::stable::Tensor>& sink, torch::stable::Tensor out);

}  // namespace ringattn
