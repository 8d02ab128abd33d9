// The ops of torch.ops.ringattn_native. They use torch's stable ABI: one binary works with every torch from 2.11 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <vector>

#include "checks.h"
#include "dispatch.h"
#include "merge.h"
#include "parallel.h"
#include "task_schedule.h"

namespace ringattn {
namespace {

void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& tiles, double scale, double softcap,
             Tensor out, Tensor lse, std::string isa) {
  const AttentionParams p = forward_params(q, k, v, scale, softcap, out, lse);
  const KernelTable& kernels = select_kernels(isa, p.dtype);
  const TaskSchedule schedule = task_schedule(tiles, p, q.size(1), k.size(1));
  const std::vector<ForwardTask> tasks = schedule.forward_tasks(p, kernels);
  run_tasks(tasks.size(), kernels.forward_scratch(p),
            [&](int64_t i, void* scratch) { kernels.forward(p, tasks[i], scratch); });
}

// p.dq += the sum of splits[1:], whose memory is contiguous.
void add_splits(const AttentionParams& p, int64_t rows, const std::vector<AccumulatorView>& splits) {
  torch::stable::parallel_for(0, p.batch * rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t head = 0; head < p.heads; ++head) {
        float* to = p.dq.data + i / rows * p.dq.batch + i % rows * p.dq.row + head * p.dq.head;
        for (size_t split = 1; split < splits.size(); ++split) {
          const float* from = splits[split].data + (i * p.heads + head) * p.dim;
          for (int64_t e = 0; e < p.dim; ++e) to[e] += from[e];
        }
      }
    }
  });
}

void backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse,
              const Tensor& delta, const Tensor& tiles, double scale, double softcap, Tensor dq, Tensor dk, Tensor dv,
              std::string isa) {
  const AttentionParams p = backward_params(dout, q, k, v, lse, delta, scale, softcap, dq, dk, dv);
  const int64_t rows = q.size(1);
  const KernelTable& kernels = select_kernels(isa, p.dtype);
  const TaskSchedule schedule = task_schedule(tiles, p, rows, k.size(1));
  // Splits of the keys share queries, so each split but the first accumulates into its own dq.
  const int64_t num_splits = TaskSchedule::num_key_splits(p, torch::stable::get_num_threads());
  const int64_t elements = p.batch * rows * p.heads * p.dim;
  std::vector<float> memory((num_splits - 1) * elements, 0.0f);
  std::vector<AccumulatorView> splits{p.dq};
  for (int64_t split = 1; split < num_splits; ++split) {
    splits.push_back({memory.data() + (split - 1) * elements, rows * p.heads * p.dim, p.heads * p.dim, p.dim});
  }
  const std::vector<BackwardTask> tasks = schedule.backward_tasks(p, splits);
  run_tasks(tasks.size(), kernels.backward_scratch(p),
            [&](int64_t i, void* scratch) { kernels.backward(p, tasks[i], scratch); });
  if (num_splits > 1) add_splits(p, rows, splits);
}

// Cuts each sequence's page table into tasks, for each kv head. The tasks have no outputs yet.
std::vector<DecodeTask> decode_tasks(const DecodeParams& p, int64_t batch) {
  // A task has enough slots to outweigh its merge, and few enough that every thread has a task.
  constexpr int64_t slots_per_task = 4096;
  const int64_t step = std::max<int64_t>(1, slots_per_task / p.page_size);
  std::vector<DecodeTask> tasks;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t entry = p.starts[b]; entry < p.starts[b + 1]; entry += step) {
      for (int64_t head = 0; head < p.kv_heads; ++head) {
        tasks.push_back({b, head, entry, std::min<int64_t>(entry + step, p.starts[b + 1]), nullptr, nullptr});
      }
    }
  }
  return tasks;
}

void decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pages, const Tensor& slots,
            const Tensor& starts, const Tensor& first, const Tensor& stop, double scale, double softcap, Tensor out,
            Tensor lse, std::string isa) {
  const DecodeParams p = decode_params(q, k, v, pages, slots, starts, first, stop, scale, softcap);
  const int64_t batch = q.size(0);
  const AccumulatorView out_view = accumulator_view(out);
  const RowStatView lse_view = row_stat_view(lse, batch, p.heads, p.tokens);
  check(has_shape(out, batch, p.tokens, p.heads, p.v_dim), "out must fit q and v");
  const KernelTable& kernels = select_kernels(isa, p.dtype);
  std::vector<DecodeTask> tasks = decode_tasks(p, batch);
  const int64_t rows = p.tokens * p.group(), task_floats = rows * (p.v_dim + 1);
  std::vector<float> partial_results(tasks.size() * task_floats);
  for (size_t i = 0; i < tasks.size(); ++i) {
    tasks[i].out = partial_results.data() + i * task_floats;
    tasks[i].lse = tasks[i].out + rows * p.v_dim;
  }
  run_tasks(tasks.size(), kernels.decode_scratch(p),
            [&](int64_t i, void* scratch) { kernels.decode(p, tasks[i], scratch); });
  // Merged in the order of the page tables, so that results do not depend on the number of threads.
  for (const DecodeTask& task : tasks) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = r / p.group(), head = task.kv_head * p.group() + r % p.group();
      merge_row(out_view.data + task.batch * out_view.batch + token * out_view.row + head * out_view.head,
                lse_view.data + task.batch * lse_view.batch + token * lse_view.row + head * lse_view.head,
                task.out + r * p.v_dim, task.lse[r], p.v_dim);
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
