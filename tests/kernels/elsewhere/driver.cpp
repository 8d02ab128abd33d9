// The kernels without torch: calls from standard input, results to standard output. Numbers are as the machine has them,
// and tensors are contiguous; see machine.py, which is at the other end. RINGATTN_SETS are the tables of instruction sets.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "task_schedule.h"

// How many instructions were interpreted, where an interpreter is linked in.
extern "C" __attribute__((weak)) int64_t interpreted();

namespace ringattn {
extern const KernelTable RINGATTN_SETS;

namespace {

template <class T>
bool read_into(T* to, size_t count) {
  return std::fread(to, sizeof(T), count, stdin) == count;
}

template <class T>
std::vector<T> take(int64_t count) {
  std::vector<T> found(count);
  if (!read_into(found.data(), count)) std::exit(3);
  return found;
}

void give(const std::vector<float>& x) { std::fwrite(x.data(), sizeof(float), x.size(), stdout); }

// What comes first. `sizes` are batch, rows, keys, heads, kv_heads, dim, v_dim, and of pages their number and size.
struct Header {
  int64_t operation, dtype, isa, tiles, sizes[9];
  double scale, softcap;
};

// A tensor (batch, rows, heads, dim) of the problem's dtype, or of floats.
struct Rows {
  Rows(const Header& h, int64_t batch, int64_t rows, int64_t heads, int64_t dim)
      : bytes(take<char>(batch * rows * heads * dim * (h.dtype == 0 ? 4 : 2))), batch(rows * heads * dim), row(heads * dim), head(dim) {}
  InputView view() const { return {bytes.data(), batch, row, head}; }
  std::vector<char> bytes;
  int64_t batch, row, head;
};
struct Floats {
  Floats(int64_t batch, int64_t rows, int64_t heads, int64_t dim)
      : data(take<float>(batch * rows * heads * dim)), batch(rows * heads * dim), row(heads * dim), head(dim) {}
  AccumulatorView rows() { return {data.data(), batch, row, head}; }
  std::vector<float> data;
  int64_t batch, row, head;
};
// (batch, heads, rows).
struct Numbers {
  Numbers(int64_t batch, int64_t heads, int64_t rows) : data(take<float>(batch * heads * rows)), heads(heads), rows(rows) {}
  RowStatView view() { return {data.data(), heads * rows, 1, rows}; }
  std::vector<float> data;
  int64_t heads, rows;
};

struct Scratch {
  explicit Scratch(int64_t bytes) : data(std::aligned_alloc(64, (bytes + 127) / 64 * 64)) {}
  ~Scratch() { std::free(data); }
  void* data;
};

AttentionParams problem(const Header& h) {
  AttentionParams p{};
  p.batch = h.sizes[0], p.heads = h.sizes[3], p.kv_heads = h.sizes[4], p.dim = h.sizes[5], p.v_dim = h.sizes[6];
  p.dtype = (Dtype)h.dtype, p.scale = (float)h.scale, p.softcap = (float)h.softcap;
  return p;
}

void forward(const Header& h, const KernelTable& kernels) {
  AttentionParams p = problem(h);
  const int64_t rows = h.sizes[1], keys = h.sizes[2];
  const std::vector<int64_t> tiles = take<int64_t>(h.tiles * 7);
  const Rows q(h, p.batch, rows, p.heads, p.dim), k(h, p.batch, keys, p.kv_heads, p.dim), v(h, p.batch, keys, p.kv_heads, p.v_dim);
  Floats out(p.batch, rows, p.heads, p.v_dim);
  Numbers lse(p.batch, p.heads, rows);
  p.q = q.view(), p.k = k.view(), p.v = v.view(), p.out = out.rows(), p.lse = lse.view();
  const TaskSchedule plan(tiles.data(), h.tiles, p.batch);
  const Scratch scratch(kernels.forward_scratch(p));
  for (const ForwardTask& task : plan.forward_tasks(p, kernels)) kernels.forward(p, task, scratch.data);
  give(out.data), give(lse.data);
}

void backward(const Header& h, const KernelTable& kernels) {
  AttentionParams p = problem(h);
  const int64_t rows = h.sizes[1], keys = h.sizes[2];
  const std::vector<int64_t> tiles = take<int64_t>(h.tiles * 7);
  const Rows dout(h, p.batch, rows, p.heads, p.v_dim), q(h, p.batch, rows, p.heads, p.dim);
  const Rows k(h, p.batch, keys, p.kv_heads, p.dim), v(h, p.batch, keys, p.kv_heads, p.v_dim);
  Numbers lse(p.batch, p.heads, rows), delta(p.batch, p.heads, rows);
  Floats dq(p.batch, rows, p.heads, p.dim), dk(p.batch, keys, p.kv_heads, p.dim), dv(p.batch, keys, p.kv_heads, p.v_dim);
  p.dout = dout.view(), p.q = q.view(), p.k = k.view(), p.v = v.view(), p.lse = lse.view(), p.delta = delta.view();
  p.dq = dq.rows(), p.dk = dk.rows(), p.dv = dv.rows();
  const TaskSchedule plan(tiles.data(), h.tiles, p.batch);
  const Scratch scratch(kernels.backward_scratch(p));
  for (const BackwardTask& task : plan.backward_tasks(p, {p.dq})) kernels.backward(p, task, scratch.data);
  give(dq.data), give(dk.data), give(dv.data);
}

// A sequence is one task a kv head: out is (sequences, kv_heads, rows of a task, v_dim), as the kernel writes it.
void decode(const Header& h, const KernelTable& kernels) {
  DecodeParams p{};
  const int64_t batch = h.sizes[0], entries = h.sizes[2], pool = h.sizes[7];
  p.tokens = h.sizes[1], p.heads = h.sizes[3], p.kv_heads = h.sizes[4], p.dim = h.sizes[5], p.v_dim = h.sizes[6];
  p.page_size = h.sizes[8], p.dtype = (Dtype)h.dtype, p.scale = (float)h.scale, p.softcap = (float)h.softcap;
  const Rows q(h, batch, p.tokens, p.heads, p.dim);
  const Rows k(h, pool, p.page_size, p.kv_heads, p.dim), v(h, pool, p.page_size, p.kv_heads, p.v_dim);
  const auto pages = take<int32_t>(entries), slots = take<int32_t>(entries * p.page_size), starts = take<int32_t>(batch + 1);
  const auto first = take<int32_t>(batch * p.tokens), stop = take<int32_t>(batch * p.tokens);
  p.q = q.view(), p.k = k.view(), p.v = v.view();
  p.pages = pages.data(), p.slots = slots.data(), p.first = first.data(), p.stop = stop.data();
  const int64_t rows = p.tokens * p.group();
  std::vector<float> out(batch * p.kv_heads * rows * p.v_dim), lse(batch * p.kv_heads * rows, -__builtin_inff());
  const Scratch scratch(kernels.decode_scratch(p));
  for (int64_t i = 0; i < batch * p.kv_heads; ++i) {
    const int64_t b = i / p.kv_heads;
    if (starts[b] == starts[b + 1]) continue;
    const DecodeTask task{b, i % p.kv_heads, starts[b], starts[b + 1], out.data() + i * rows * p.v_dim, lse.data() + i * rows};
    kernels.decode(p, task, scratch.data);
  }
  give(out), give(lse);
}

template <class... Sets>
const KernelTable& numbered(int64_t i, const Sets&... sets) {
  const KernelTable* const all[] = {&sets...};
  return *all[i];
}

}  // namespace
}  // namespace ringattn

int main() {
  using namespace ringattn;
  constexpr void (*operations[])(const Header&, const KernelTable&) = {forward, backward, decode};
  for (Header h; read_into(&h, 1); std::fflush(stdout)) {
    operations[h.operation](h, numbered(h.isa, RINGATTN_SETS));
    const int64_t count = interpreted ? interpreted() : 0;
    std::fwrite(&count, sizeof count, 1, stdout);
  }
}
