// Parameters and tasks of the CPU kernels: pointers, strides and integers. No torch, no instruction set.
#pragma once
#include <cstdint>

namespace ringattn {

enum class Dtype : int { float32, bfloat16, float16 };

// A tensor (batch, rows, heads, dim) whose last dim is contiguous. Strides count elements.
template <class Pointer>
struct TensorView {
  Pointer data;
  int64_t batch, row, head;
};
using InputView = TensorView<const void*>;   // elements of the params' dtype
using AccumulatorView = TensorView<float*>;  // out and gradients
using RowStatView = TensorView<float*>;      // lse or delta: (batch, heads, rows), one number per row

// Queries [q_start, q_stop) attend to keys [k_start, k_stop) where lo <= j - i <= hi. `batch` is the batch row that the
// tile applies to; a negative number means all of them.
struct Tile {
  int64_t q_start, q_stop, k_start, k_stop, lo, hi, batch;
};

struct AttentionParams {
  InputView q, k, v, dout;
  AccumulatorView out, dq, dk, dv;
  RowStatView lse, delta;
  int64_t batch, heads, kv_heads, dim, v_dim;
  Dtype dtype;
  float scale;
  float softcap;  // 0: none
  int64_t group() const { return heads / kv_heads; }
};

// An interval of queries that all see the same tiles, and no others.
struct QuerySegment {
  int64_t q_start, q_stop;
  const Tile* const* tiles;
  int64_t num_tiles;
};

// Query blocks [first, first + count) of a segment, for all query heads of one kv head. Block i covers row block
// i / group and query head i % group, so that neighbouring blocks share keys.
struct ForwardTask {
  int64_t batch, kv_head;
  const QuerySegment* segment;
  int64_t first, count;
};

// Keys [k_start, k_stop) against all queries that see them. `dq` may be a private accumulator of the task's key split.
struct BackwardTask {
  int64_t batch, kv_head, k_start, k_stop;
  const QuerySegment* segments;
  int64_t num_segments;
  AccumulatorView dq;
};

// A few query rows per sequence against keys in pages. In k and v, the `batch` stride is the stride of pages and the
// `row` stride is the stride of slots within a page.
struct DecodeParams {
  InputView q, k, v;
  const int32_t* pages;   // (entries): the page of each entry of the page tables
  const int32_t* slots;   // (entries, page_size): the position in each slot
  const int32_t* starts;  // (batch + 1): sequence b has entries [starts[b], starts[b + 1]); kernels do not read it
  const int32_t *first, *stop;  // (batch, tokens): each row sees positions [first, stop)
  int64_t tokens, page_size, heads, kv_heads, dim, v_dim;
  Dtype dtype;
  float scale;
  float softcap;  // 0: none
  int64_t group() const { return heads / kv_heads; }
};

// Page table entries [first, stop) of a sequence, for all query rows of one kv head: row i is token i / group and query
// head i % group. The task writes its partial result to out (rows, v_dim) and lse (rows).
struct DecodeTask {
  int64_t batch, kv_head, first, stop;
  float *out, *lse;
};

// The kernels of one instruction set. `*_scratch` return bytes; a kernel takes that much memory, aligned to 64 bytes.
struct KernelTable {
  const char* name;
  int64_t block_rows;  // queries of a block
  int64_t (*blocks_per_task)(const AttentionParams&);
  int64_t (*forward_scratch)(const AttentionParams&);
  void (*forward)(const AttentionParams&, const ForwardTask&, void* scratch);
  int64_t (*backward_scratch)(const AttentionParams&);
  void (*backward)(const AttentionParams&, const BackwardTask&, void* scratch);
  int64_t (*decode_scratch)(const DecodeParams&);
  void (*decode)(const DecodeParams&, const DecodeTask&, void* scratch);
};

}  // namespace ringattn
