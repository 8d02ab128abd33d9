// The operations as torch sees them, by its stable ABI: one binary for every torch from 2.11 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "task_schedule.h"

namespace ringattn {

extern const KernelTable PORTABLE, EMULATED_BF16;
#if defined(__x86_64__)
extern const KernelTable AVX2, AVX512, AVX512_BF16;
#endif

namespace {

using torch::stable::Tensor;

struct Choice {
  const KernelTable* kernels;
  bool bf16_only;
  bool here;  // whether this processor has the instructions
};

// Widest first.
std::vector<Choice> choices() {
  std::vector<Choice> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  found.push_back({&AVX512_BF16, true, avx512 && __builtin_cpu_supports("avx512bf16")});
  found.push_back({&AVX512, false, avx512});
  found.push_back({&AVX2, false, avx2});
#endif
  found.push_back({&PORTABLE, false, true});
  found.push_back({&EMULATED_BF16, true, true});
  return found;
}

// The instruction sets that take a dtype on this processor, the one that is used first, by name and comma.
std::string instruction_sets(bool bf16) {
  std::string names;
  for (const Choice& choice : choices()) {
    if (!choice.here || (choice.bf16_only && !bf16)) continue;
    if (!names.empty()) names += ",";
    names += choice.kernels->name;
  }
  return names;
}

const KernelTable& select(const std::string& name, Dtype dtype) {
  for (const Choice& choice : choices()) {
    const bool takes = choice.here && (dtype == Dtype::bfloat16 || !choice.bf16_only);
    if (takes && (name.empty() || name == choice.kernels->name)) return *choice.kernels;
  }
  STD_TORCH_CHECK(false, "isa='", name, "' does not run on this processor, or not for this dtype");
}

Dtype dtype_of(const Tensor& x) {
  using torch::headeronly::ScalarType;
  const ScalarType type = x.scalar_type();
  if (type == ScalarType::Float) return Dtype::float32;
  if (type == ScalarType::BFloat16) return Dtype::bfloat16;
  STD_TORCH_CHECK(type == ScalarType::Half, "q, k and v must be float32, bfloat16 or float16");
  return Dtype::float16;
}

// Everything that a kernel would not survive is checked here, whoever calls.
void check(bool holds, const char* what) { STD_TORCH_CHECK(holds, what); }

void check_rows(const Tensor& x, const char* what) {
  check(x.is_cpu() && x.dim() == 4 && (x.numel() == 0 || x.size(3) == 1 || x.stride(3) == 1), what);
}

InputView input(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

AccumulatorView state(const Tensor& x) {
  check(x.scalar_type() == torch::headeronly::ScalarType::Float, "states and gradients must be float32");
  check_rows(x, "states and gradients must be (batch, rows, heads, dim) on the CPU, with contiguous dims");
  return {static_cast<float*>(x.mutable_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

RowStatView statistic(const Tensor& x, const AttentionParams& p, int64_t rows) {
  check(x.is_cpu() && x.scalar_type() == torch::headeronly::ScalarType::Float && x.dim() == 3,
        "lse and delta must be float32 (batch, heads, rows) on the CPU");
  check(x.size(0) == p.batch && x.size(1) == p.heads && x.size(2) == rows, "lse and delta must fit q");
  return {static_cast<float*>(x.mutable_data_ptr()), x.stride(0), x.stride(2), x.stride(1)};
}

bool same_shape(const Tensor& a, int64_t batch, int64_t rows, int64_t heads, int64_t dim) {
  return a.size(0) == batch && a.size(1) == rows && a.size(2) == heads && a.size(3) == dim;
}

AttentionParams problem(const Tensor& q, const Tensor& k, const Tensor& v, double scale, double softcap) {
  for (const Tensor& x : {q, k, v})
    check_rows(x, "q, k and v must be (batch, rows, heads, dim) on the CPU, with contiguous dims");
  AttentionParams p{};
  p.batch = q.size(0), p.heads = q.size(2), p.kv_heads = k.size(2), p.dim = q.size(3), p.v_dim = v.size(3);
  p.dtype = dtype_of(q);
  p.scale = (float)scale, p.softcap = (float)softcap;
  check(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "q, k and v must have one dtype");
  check(p.dim > 0 && p.v_dim > 0, "q, k and v must have dims");
  check(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "the heads of q must be a multiple of those of k");
  check(same_shape(k, p.batch, k.size(1), p.kv_heads, p.dim), "k must fit q");
  check(same_shape(v, p.batch, k.size(1), p.kv_heads, p.v_dim), "v must fit k");
  p.q = input(q), p.k = input(k), p.v = input(v);
  return p;
}

TaskSchedule schedule(const Tensor& tiles, const AttentionParams& p, int64_t rows, int64_t keys) {
  check(tiles.is_cpu() && tiles.scalar_type() == torch::headeronly::ScalarType::Long && tiles.dim() == 2 &&
            tiles.size(1) == 7 && tiles.is_contiguous(),
        "tiles must be a contiguous (n, 7) int64 tensor on the CPU");
  const int64_t* t = static_cast<const int64_t*>(tiles.const_data_ptr());
  for (int64_t i = 0; i < tiles.size(0); ++i, t += 7) {
    check(0 <= t[0] && t[0] < t[1] && t[1] <= rows && 0 <= t[2] && t[2] < t[3] && t[3] <= keys && t[6] < p.batch,
          "a tile lies outside of q or k");
  }
  return TaskSchedule(static_cast<const int64_t*>(tiles.const_data_ptr()), tiles.size(0), p.batch);
}

// Memory that a thread of the caller's keeps for its next call: fresh pages cost more than a small call does.
void* scratch(size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> held;
  static thread_local size_t size = 0;
#if defined(__SANITIZE_ADDRESS__)
  size = 0;  // each call gets its own: what is stale, or beyond the end, shows
#endif
  if (size < bytes) {
    held.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    size = held ? bytes : 0;
    if (!held) throw std::bad_alloc();
  }
  return held.get();
}

// Runs tasks 0 to count on torch's threads; who is done with one takes the next.
template <class Run>
void run_tasks(int64_t count, int64_t scratch_bytes, const Run& run) {
  const int64_t workers = std::min<int64_t>(count, torch::stable::get_num_threads());
  if (workers == 0) return;
  const int64_t pitch = (scratch_bytes + 4095) / 4096 * 4096 + 64;  // no two workers' buffers alike in cache
  char* memory = static_cast<char*>(scratch(workers * pitch));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t i = next++; i < count; i = next++) run(i, memory + worker * pitch);
    }
  });
}

void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& tiles, double scale, double softcap,
             Tensor out, Tensor lse, std::string isa) {
  AttentionParams p = problem(q, k, v, scale, softcap);
  p.out = state(out), p.lse = statistic(lse, p, q.size(1));
  check(same_shape(out, p.batch, q.size(1), p.heads, p.v_dim), "out must fit q and v");
  const KernelTable& kernels = select(isa, p.dtype);
  const TaskSchedule plan = schedule(tiles, p, q.size(1), k.size(1));
  const std::vector<ForwardTask> tasks = plan.forward(p, kernels);
  run_tasks(tasks.size(), kernels.forward_scratch(p),
            [&](int64_t i, void* memory) { kernels.forward(p, tasks[i], memory); });
}

void backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse,
              const Tensor& delta, const Tensor& tiles, double scale, double softcap, Tensor dq, Tensor dk, Tensor dv,
              std::string isa) {
  AttentionParams p = problem(q, k, v, scale, softcap);
  const int64_t rows = q.size(1), keys = k.size(1);
  check_rows(dout, "dout must be (batch, rows, heads, dim) on the CPU, with contiguous dims");
  check(dout.scalar_type() == q.scalar_type() && same_shape(dout, p.batch, rows, p.heads, p.v_dim),
        "dout must fit q and v");
  p.dout = input(dout), p.lse = statistic(lse, p, rows), p.delta = statistic(delta, p, rows);
  p.dq = state(dq), p.dk = state(dk), p.dv = state(dv);
  check(same_shape(dq, p.batch, rows, p.heads, p.dim), "dq must fit q");
  check(same_shape(dk, p.batch, keys, p.kv_heads, p.dim), "dk must fit k");
  check(same_shape(dv, p.batch, keys, p.kv_heads, p.v_dim), "dv must fit v");
  const KernelTable& kernels = select(isa, p.dtype);
  const TaskSchedule plan = schedule(tiles, p, rows, keys);
  const int64_t num_parts = TaskSchedule::num_parts(p, torch::stable::get_num_threads());
  // Parts of the keys share queries: each but the first sums up a dq of its own.
  const int64_t elements = p.batch * rows * p.heads * p.dim;
  std::vector<float> own((num_parts - 1) * elements, 0.0f);
  std::vector<AccumulatorView> parts{p.dq};
  for (int64_t part = 1; part < num_parts; ++part) {
    parts.push_back({own.data() + (part - 1) * elements, rows * p.heads * p.dim, p.heads * p.dim, p.dim});
  }
  const std::vector<BackwardTask> tasks = plan.backward(p, parts);
  run_tasks(tasks.size(), kernels.backward_scratch(p),
            [&](int64_t i, void* memory) { kernels.backward(p, tasks[i], memory); });
  if (num_parts == 1) return;
  torch::stable::parallel_for(0, p.batch * rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t head = 0; head < p.heads; ++head) {
        float* to = p.dq.data + i / rows * p.dq.batch + i % rows * p.dq.row + head * p.dq.head;
        for (size_t part = 1; part < parts.size(); ++part) {
          const float* from = parts[part].data + (i * p.heads + head) * p.dim;
          for (int64_t e = 0; e < p.dim; ++e) to[e] += from[e];
        }
      }
    }
  });
}

const int32_t* integers(const Tensor& x, int64_t count, const char* what) {
  check(x.is_cpu() && x.scalar_type() == torch::headeronly::ScalarType::Int && x.is_contiguous() && x.numel() == count,
        what);
  return static_cast<const int32_t*>(x.const_data_ptr());
}

// Slots of one task: enough to outweigh its merge, few enough that every thread has some.
constexpr int64_t TASK_SLOTS = 4096;

// Merges a partial result of one row into its state.
void merge_row(float* out, float* lse, const float* part, float part_lse, int64_t dim) {
  if (part_lse == -std::numeric_limits<float>::infinity()) return;
  const float top = std::max(*lse, part_lse), mine = std::exp(*lse - top), theirs = std::exp(part_lse - top);
  const float weight = theirs / (mine + theirs);
  for (int64_t e = 0; e < dim; ++e) out[e] += (part[e] - out[e]) * weight;
  *lse = top + std::log(mine + theirs);
}

void decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pages, const Tensor& slots,
            const Tensor& starts, const Tensor& first, const Tensor& stop, double scale, double softcap, Tensor out,
            Tensor lse, std::string isa) {
  for (const Tensor& x : {q, k, v}) check_rows(x, "q, k and v must have 4 dims, the last contiguous, on the CPU");
  check(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "q, k and v must have one dtype");
  const int64_t batch = q.size(0), entries = pages.numel();
  DecodeParams p{};
  p.q = input(q), p.k = input(k), p.v = input(v), p.dtype = dtype_of(q);
  p.tokens = q.size(1), p.heads = q.size(2), p.dim = q.size(3), p.page_size = k.size(1), p.kv_heads = k.size(2);
  p.v_dim = v.size(3), p.scale = (float)scale, p.softcap = (float)softcap;
  check(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "the heads of q must be a multiple of those of k");
  check(k.size(3) == p.dim && same_shape(v, k.size(0), p.page_size, p.kv_heads, p.v_dim), "k and v must fit q");
  p.pages = integers(pages, entries, "pages must be int32"),
  p.slots = integers(slots, entries * p.page_size, "slots must fit pages");
  p.first = integers(first, batch * p.tokens, "first must fit q"),
  p.stop = integers(stop, batch * p.tokens, "stop must fit q");
  const int32_t* start = integers(starts, batch + 1, "starts must fit q");
  for (int64_t i = 0; i < entries; ++i) check(0 <= p.pages[i] && p.pages[i] < k.size(0), "there is no such page");
  for (int64_t i = 0; i < batch; ++i)
    check(0 <= start[i] && start[i] <= start[i + 1] && start[i + 1] <= entries, "starts must ascend");
  const AccumulatorView to = state(out);
  AttentionParams shape{};
  shape.batch = batch, shape.heads = p.heads;
  const RowStatView sums = statistic(lse, shape, p.tokens);
  check(same_shape(out, batch, p.tokens, p.heads, p.v_dim), "out must fit q and v");
  const int64_t step = std::max<int64_t>(1, TASK_SLOTS / p.page_size), rows = p.tokens * p.group();
  std::vector<DecodeTask> tasks;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t entry = start[b]; entry < start[b + 1]; entry += step) {
      for (int64_t head = 0; head < p.kv_heads; ++head) {
        tasks.push_back({b, head, entry, std::min<int64_t>(entry + step, start[b + 1]), nullptr, nullptr});
      }
    }
  }
  std::vector<float> found(tasks.size() * rows * (p.v_dim + 1));
  for (size_t i = 0; i < tasks.size(); ++i) {
    tasks[i].out = found.data() + i * rows * (p.v_dim + 1);
    tasks[i].lse = tasks[i].out + rows * p.v_dim;
  }
  const KernelTable& kernels = select(isa, p.dtype);
  run_tasks(tasks.size(), kernels.decode_scratch(p),
            [&](int64_t i, void* memory) { kernels.decode(p, tasks[i], memory); });
  // In the order of the table, whoever computed what: results do not depend on the number of threads.
  for (const DecodeTask& task : tasks) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = r / p.group(), head = task.kv_head * p.group() + r % p.group();
      merge_row(to.data + task.batch * to.batch + token * to.row + head * to.head,
                sums.data + task.batch * sums.batch + token * sums.row + head * sums.head, task.out + r * p.v_dim,
                task.lse[r], p.v_dim);
    }
  }
}

// The weights of one row's parts, which lie `pitch` apart in `lses`; place[i] is where the i-th of them lies.
void weigh(const float* lses, int64_t pitch, const std::vector<int64_t>& place, const float* sink, float* weights) {
  constexpr float LEAST = std::numeric_limits<float>::lowest(), MOST = std::numeric_limits<float>::max();
  // Nothing anywhere: (-inf) - (-inf) is NaN, but zeros may be weighed alike.
  const float logit = sink ? std::min(std::max(*sink, LEAST), MOST) : LEAST;
  float top = logit;
  for (size_t i = 0; i < place.size(); ++i) {
    weights[i] = std::max(lses[place[i] * pitch], LEAST);
    top = std::max(top, weights[i]);
  }
  float sum = sink ? std::exp(logit - top) : 0.0f;
  for (size_t i = 0; i < place.size(); ++i) sum += weights[i] = std::exp(weights[i] - top);
  for (size_t i = 0; i < place.size(); ++i) weights[i] /= sum;
}

template <size_t N>
std::array<int64_t, N> strides(const Tensor& x) {
  std::array<int64_t, N> found;
  for (size_t i = 0; i < N; ++i) found[i] = x.stride(i);
  return found;
}

// Row by row, the parts in their order: what a row gets does not depend on which rows there are beside it.
void merge(const Tensor& outs, const Tensor& lses, int64_t first, const std::optional<Tensor>& sink, Tensor out) {
  using torch::headeronly::ScalarType;
  for (const Tensor& x : {outs, lses, out}) {
    check(x.is_cpu() && x.scalar_type() == ScalarType::Float, "partial results must be float32 on the CPU");
  }
  check(outs.dim() == 5 && lses.dim() == 4 && out.dim() == 4, "outs, lses and out must have 5, 4 and 4 dims");
  const int64_t parts = outs.size(0), batch = outs.size(1), rows = outs.size(2), heads = outs.size(3),
                dim = outs.size(4);
  check(0 <= first && first < parts, "first must be the place of a part");
  check(lses.size(0) == parts && lses.size(1) == batch && lses.size(2) == heads && lses.size(3) == rows,
        "lses must fit outs");
  check(same_shape(out, batch, rows, heads, dim), "out must fit outs");
  check(out.numel() == 0 || dim == 1 || (outs.stride(4) == 1 && out.stride(3) == 1), "dims must be contiguous");
  const float* sinks = nullptr;
  if (sink) {
    check(sink->is_cpu() && sink->scalar_type() == ScalarType::Float && sink->is_contiguous() && sink->numel() == heads,
          "sink must be float32 (heads,)");
    sinks = static_cast<const float*>(sink->const_data_ptr());
  }
  std::vector<int64_t> place(parts);
  for (int64_t i = 0; i < parts; ++i) place[i] = i == first ? 0 : i < first ? i + 1 : i;
  std::vector<float> weights(parts);
  const float* all = static_cast<const float*>(outs.const_data_ptr());
  const float* all_lse = static_cast<const float*>(lses.const_data_ptr());
  float* result = static_cast<float*>(out.mutable_data_ptr());
  // Each stride is a call into torch, which costs more than a row of a few heads.
  const auto pitch = strides<5>(outs);
  const auto lse_pitch = strides<4>(lses);
  const auto out_pitch = strides<4>(out);
  for (int64_t n = 0; n < batch * rows * heads; ++n) {
    const int64_t head = n % heads, row = n / heads % rows, b = n / heads / rows;
    weigh(all_lse + b * lse_pitch[1] + head * lse_pitch[2] + row * lse_pitch[3], lse_pitch[0], place,
          sinks ? sinks + head : nullptr, weights.data());
    const float* from = all + b * pitch[1] + row * pitch[2] + head * pitch[3];
    float* to = result + b * out_pitch[0] + row * out_pitch[1] + head * out_pitch[2];
    for (int64_t i = 0; i < parts; ++i) {
      const float* part = from + place[i] * pitch[0];
      const float weight = weights[i];
      if (i == 0) {
        for (int64_t e = 0; e < dim; ++e) to[e] = weight * part[e];
      } else {
        for (int64_t e = 0; e < dim; ++e) to[e] += weight * part[e];
      }
    }
  }
}

}  // namespace
}  // namespace ringattn

STABLE_TORCH_LIBRARY(ringattn_native, m) {
  m.def("instruction_sets(bool bf16) -> str");
  m.def(
      "forward(Tensor q, Tensor k, Tensor v, Tensor tiles, float scale, float softcap, Tensor(a!) out, "
      "Tensor(b!) lse, str isa) -> ()");
  m.def(
      "backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor delta, Tensor tiles, float scale, "
      "float softcap, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, str isa) -> ()");
  m.def(
      "decode(Tensor q, Tensor k, Tensor v, Tensor pages, Tensor slots, Tensor starts, Tensor first, Tensor stop, "
      "float scale, float softcap, Tensor(a!) out, Tensor(b!) lse, str isa) -> ()");
  m.def("merge(Tensor outs, Tensor lses, int first, Tensor? sink, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ringattn_native, CPU, m) {
  m.impl("forward", TORCH_BOX(&ringattn::forward));
  m.impl("backward", TORCH_BOX(&ringattn::backward));
  m.impl("decode", TORCH_BOX(&ringattn::decode));
  m.impl("merge", TORCH_BOX(&ringattn::merge));
}

STABLE_TORCH_LIBRARY_IMPL(ringattn_native, CompositeExplicitAutograd, m) {
  m.impl("instruction_sets", TORCH_BOX(&ringattn::instruction_sets));
}
