// Turns tensors into kernel parameters. Checks everything that a kernel relies on, and throws if it does not hold.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include "params.h"
#include "task_schedule.h"

namespace ringattn {

using torch::stable::Tensor;

// Throws `message` unless `condition` holds.
void check(bool condition, const char* message);

// Whether a tensor of 4 dims has this shape.
bool has_shape(const Tensor& x, int64_t batch, int64_t rows, int64_t heads, int64_t dim);

// The view of out or a gradient, and of lse or delta, which must have the shape (batch, heads, rows).
AccumulatorView accumulator_view(const Tensor& x);
RowStatView row_stat_view(const Tensor& x, int64_t batch, int64_t heads, int64_t rows);

// Parameters of forward, with all of its views.
AttentionParams forward_params(const Tensor& q, const Tensor& k, const Tensor& v, double scale, double softcap,
                               const Tensor& out, const Tensor& lse);

// The schedule of a call with this many rows of q and k; tiles: (n, 7) int64.
TaskSchedule task_schedule(const Tensor& tiles, const AttentionParams& p, int64_t rows, int64_t keys);

// Parameters of backward, with all of its views.
AttentionParams backward_params(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                const Tensor& lse, const Tensor& delta, double scale, double softcap, const Tensor& dq,
                                const Tensor& dk, const Tensor& dv);

// Parameters of decode.
DecodeParams decode_params(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pages, const Tensor& slots,
                           const Tensor& starts, const Tensor& first, const Tensor& stop, double scale, double softcap);

}  // namespace ringattn
