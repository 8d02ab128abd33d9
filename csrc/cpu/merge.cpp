#include "merge.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "checks.h"

namespace ringattn {
namespace {

constexpr float FP32_MIN = std::numeric_limits<float>::lowest(), FP32_MAX = std::numeric_limits<float>::max();

// The softmax weights of one row's parts. The lse of part i is lses[i * pitch]; weights[n] belongs to part order[n].
void softmax_weights(const float* lses, int64_t pitch, const std::vector<int64_t>& order, const float* sink,
                     float* weights) {
  // Finite bounds, since (-inf) - (-inf) is NaN. If all parts are empty, their weights do not matter: their outs are 0.
  const float logit = sink ? std::min(std::max(*sink, FP32_MIN), FP32_MAX) : FP32_MIN;
  float m = logit;
  for (size_t i = 0; i < order.size(); ++i) {
    weights[i] = std::max(lses[order[i] * pitch], FP32_MIN);
    m = std::max(m, weights[i]);
  }
  float sum = sink ? std::exp(logit - m) : 0.0f;
  for (size_t i = 0; i < order.size(); ++i) sum += weights[i] = std::exp(weights[i] - m);
  for (size_t i = 0; i < order.size(); ++i) weights[i] /= sum;
}

// The order of the sum: parts 1 to `first`, part 0, and then the remaining parts.
std::vector<int64_t> summation_order(int64_t parts, int64_t first) {
  std::vector<int64_t> order(parts);
  for (int64_t i = 0; i < parts; ++i) order[i] = i == first ? 0 : i < first ? i + 1 : i;
  return order;
}

template <size_t N>
std::array<int64_t, N> strides(const Tensor& x) {
  std::array<int64_t, N> found;
  for (size_t i = 0; i < N; ++i) found[i] = x.stride(i);
  return found;
}

void check_merge(const Tensor& outs, const Tensor& lses, int64_t first, const std::optional<Tensor>& sink,
                 const Tensor& out) {
  using torch::headeronly::ScalarType;
  for (const Tensor& x : {outs, lses, out}) {
    check(x.is_cpu() && x.scalar_type() == ScalarType::Float, "partial results must be float32 on the CPU");
  }
  check(outs.dim() == 5 && lses.dim() == 4 && out.dim() == 4, "outs, lses and out must have 5, 4 and 4 dims");
  const int64_t parts = outs.size(0), batch = outs.size(1), rows = outs.size(2), heads = outs.size(3);
  const int64_t dim = outs.size(4);
  check(0 <= first && first < parts, "first must be the place of a part");
  check(has_shape(lses, parts, batch, heads, rows), "lses must fit outs");
  check(has_shape(out, batch, rows, heads, dim), "out must fit outs");
  check(out.numel() == 0 || dim == 1 || (outs.stride(4) == 1 && out.stride(3) == 1), "dims must be contiguous");
  if (sink) {
    check(sink->is_cpu() && sink->scalar_type() == ScalarType::Float && sink->is_contiguous() && sink->numel() == heads,
          "sink must be float32 (heads,)");
  }
}

}  // namespace

void merge_row(float* out, float* lse, const float* part, float part_lse, int64_t dim) {
  if (part_lse == -std::numeric_limits<float>::infinity()) return;
  const float m = std::max(*lse, part_lse), state_exp = std::exp(*lse - m), part_exp = std::exp(part_lse - m);
  const float weight = part_exp / (state_exp + part_exp);
  for (int64_t e = 0; e < dim; ++e) out[e] += (part[e] - out[e]) * weight;
  *lse = m + std::log(state_exp + part_exp);
}

// Each row's parts are summed in the same order, so that a row's result does not depend on the other rows.
void merge(const Tensor& outs, const Tensor& lses, int64_t first, const std::optional<Tensor>& sink, Tensor out) {
  check_merge(outs, lses, first, sink, out);
  const int64_t parts = outs.size(0), batch = outs.size(1), rows = outs.size(2), heads = outs.size(3);
  const int64_t dim = outs.size(4);
  const std::vector<int64_t> order = summation_order(parts, first);
  std::vector<float> weights(parts);
  const float* outs_data = static_cast<const float*>(outs.const_data_ptr());
  const float* lses_data = static_cast<const float*>(lses.const_data_ptr());
  const float* sinks = sink ? static_cast<const float*>(sink->const_data_ptr()) : nullptr;
  float* out_data = static_cast<float*>(out.mutable_data_ptr());
  // Read once: each call of stride() is a call into torch, and takes longer than a row of a few heads.
  const auto outs_strides = strides<5>(outs);
  const auto lses_strides = strides<4>(lses), out_strides = strides<4>(out);
  for (int64_t n = 0; n < batch * rows * heads; ++n) {
    const int64_t head = n % heads, row = n / heads % rows, b = n / heads / rows;
    softmax_weights(lses_data + b * lses_strides[1] + head * lses_strides[2] + row * lses_strides[3], lses_strides[0],
                    order, sinks ? sinks + head : nullptr, weights.data());
    const float* from = outs_data + b * outs_strides[1] + row * outs_strides[2] + head * outs_strides[3];
    float* to = out_data + b * out_strides[0] + row * out_strides[1] + head * out_strides[2];
    for (int64_t i = 0; i < parts; ++i) {
      const float* part = from + order[i] * outs_strides[0];
      const float weight = weights[i];
      if (i == 0) {
        for (int64_t e = 0; e < dim; ++e) to[e] = weight * part[e];
      } else {
        for (int64_t e = 0; e < dim; ++e) to[e] += weight * part[e];
      }
    }
  }
}

}  // namespace ringattn
