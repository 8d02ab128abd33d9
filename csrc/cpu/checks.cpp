#include "checks.h"

#include <torch/csrc/stable/library.h>

namespace ringattn {
namespace {

using torch::headeronly::ScalarType;

Dtype dtype_of(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  if (type == ScalarType::Float) return Dtype::float32;
  if (type == ScalarType::BFloat16) return Dtype::bfloat16;
  STD_TORCH_CHECK(type == ScalarType::Half, "q, k and v must be float32, bfloat16 or float16");
  return Dtype::float16;
}

void check_rows(const Tensor& x, const char* message) {
  check(x.is_cpu() && x.dim() == 4 && (x.numel() == 0 || x.size(3) == 1 || x.stride(3) == 1), message);
}

void check_one_dtype(const Tensor& q, const Tensor& k, const Tensor& v) {
  check(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "q, k and v must have one dtype");
}

void check_heads(int64_t heads, int64_t kv_heads) {
  check(kv_heads > 0 && heads % kv_heads == 0, "the number of q heads must be a multiple of the number of k heads");
}

const int32_t* int32_data(const Tensor& x, int64_t count, const char* message) {
  check(x.is_cpu() && x.scalar_type() == ScalarType::Int && x.is_contiguous() && x.numel() == count, message);
  return static_cast<const int32_t*>(x.const_data_ptr());
}

InputView input_view(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// Parameters with the views of q, k and v.
AttentionParams input_params(const Tensor& q, const Tensor& k, const Tensor& v, double scale, double softcap) {
  for (const Tensor& x : {q, k, v}) {
    check_rows(x, "q, k and v must be (batch, rows, heads, dim) on the CPU, with contiguous dims");
  }
  AttentionParams p{};
  p.batch = q.size(0), p.heads = q.size(2), p.kv_heads = k.size(2), p.dim = q.size(3), p.v_dim = v.size(3);
  p.dtype = dtype_of(q);
  p.scale = (float)scale, p.softcap = (float)softcap;
  check_one_dtype(q, k, v);
  check(p.dim > 0 && p.v_dim > 0, "q, k and v must have dims");
  check_heads(p.heads, p.kv_heads);
  check(has_shape(k, p.batch, k.size(1), p.kv_heads, p.dim), "k must fit q");
  check(has_shape(v, p.batch, k.size(1), p.kv_heads, p.v_dim), "v must fit k");
  p.q = input_view(q), p.k = input_view(k), p.v = input_view(v);
  return p;
}

}  // namespace

void check(bool condition, const char* message) { STD_TORCH_CHECK(condition, message); }

bool has_shape(const Tensor& x, int64_t batch, int64_t rows, int64_t heads, int64_t dim) {
  return x.size(0) == batch && x.size(1) == rows && x.size(2) == heads && x.size(3) == dim;
}

AccumulatorView accumulator_view(const Tensor& x) {
  check(x.scalar_type() == ScalarType::Float, "out and gradients must be float32");
  check_rows(x, "out and gradients must be (batch, rows, heads, dim) on the CPU, with contiguous dims");
  return {static_cast<float*>(x.mutable_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

RowStatView row_stat_view(const Tensor& x, int64_t batch, int64_t heads, int64_t rows) {
  check(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.dim() == 3,
        "lse and delta must be float32 (batch, heads, rows) on the CPU");
  check(x.size(0) == batch && x.size(1) == heads && x.size(2) == rows, "lse and delta must fit q");
  return {static_cast<float*>(x.mutable_data_ptr()), x.stride(0), x.stride(2), x.stride(1)};
}

AttentionParams forward_params(const Tensor& q, const Tensor& k, const Tensor& v, double scale, double softcap,
                               const Tensor& out, const Tensor& lse) {
  AttentionParams p = input_params(q, k, v, scale, softcap);
  p.out = accumulator_view(out), p.lse = row_stat_view(lse, p.batch, p.heads, q.size(1));
  check(has_shape(out, p.batch, q.size(1), p.heads, p.v_dim), "out must fit q and v");
  return p;
}

AttentionParams backward_params(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                const Tensor& lse, const Tensor& delta, double scale, double softcap, const Tensor& dq,
                                const Tensor& dk, const Tensor& dv) {
  AttentionParams p = input_params(q, k, v, scale, softcap);
  const int64_t rows = q.size(1), keys = k.size(1);
  check_rows(dout, "dout must be (batch, rows, heads, dim) on the CPU, with contiguous dims");
  check(dout.scalar_type() == q.scalar_type() && has_shape(dout, p.batch, rows, p.heads, p.v_dim),
        "dout must fit q and v");
  p.dout = input_view(dout);
  p.lse = row_stat_view(lse, p.batch, p.heads, rows), p.delta = row_stat_view(delta, p.batch, p.heads, rows);
  p.dq = accumulator_view(dq), p.dk = accumulator_view(dk), p.dv = accumulator_view(dv);
  check(has_shape(dq, p.batch, rows, p.heads, p.dim), "dq must fit q");
  check(has_shape(dk, p.batch, keys, p.kv_heads, p.dim), "dk must fit k");
  check(has_shape(dv, p.batch, keys, p.kv_heads, p.v_dim), "dv must fit v");
  return p;
}

TaskSchedule task_schedule(const Tensor& tiles, const AttentionParams& p, int64_t rows, int64_t keys) {
  check(tiles.is_cpu() && tiles.scalar_type() == ScalarType::Long && tiles.dim() == 2 && tiles.size(1) == 7 &&
            tiles.is_contiguous(),
        "tiles must be a contiguous (n, 7) int64 tensor on the CPU");
  const int64_t* table = static_cast<const int64_t*>(tiles.const_data_ptr());
  for (int64_t i = 0; i < tiles.size(0); ++i) {
    const int64_t* t = table + 7 * i;
    check(0 <= t[0] && t[0] < t[1] && t[1] <= rows && 0 <= t[2] && t[2] < t[3] && t[3] <= keys && t[6] < p.batch,
          "a tile lies outside of q or k");
  }
  return TaskSchedule(table, tiles.size(0), p.batch);
}

DecodeParams decode_params(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pages, const Tensor& slots,
                           const Tensor& starts, const Tensor& first, const Tensor& stop, double scale,
                           double softcap) {
  for (const Tensor& x : {q, k, v}) check_rows(x, "q, k and v must have 4 dims, the last contiguous, on the CPU");
  check_one_dtype(q, k, v);
  const int64_t batch = q.size(0), entries = pages.numel();
  DecodeParams p{};
  p.q = input_view(q), p.k = input_view(k), p.v = input_view(v), p.dtype = dtype_of(q);
  p.tokens = q.size(1), p.heads = q.size(2), p.dim = q.size(3), p.page_size = k.size(1), p.kv_heads = k.size(2);
  p.v_dim = v.size(3), p.scale = (float)scale, p.softcap = (float)softcap;
  check_heads(p.heads, p.kv_heads);
  check(k.size(3) == p.dim && has_shape(v, k.size(0), p.page_size, p.kv_heads, p.v_dim), "k and v must fit q");
  p.pages = int32_data(pages, entries, "pages must be int32");
  p.slots = int32_data(slots, entries * p.page_size, "slots must fit pages");
  p.first = int32_data(first, batch * p.tokens, "first must fit q");
  p.stop = int32_data(stop, batch * p.tokens, "stop must fit q");
  p.starts = int32_data(starts, batch + 1, "starts must fit q");
  for (int64_t i = 0; i < entries; ++i) check(0 <= p.pages[i] && p.pages[i] < k.size(0), "there is no such page");
  for (int64_t i = 0; i < batch; ++i) {
    check(0 <= p.starts[i] && p.starts[i] <= p.starts[i + 1] && p.starts[i + 1] <= entries, "starts must ascend");
  }
  return p;
}

}  // namespace ringattn
