// What a kernel is asked to do: pointers, strides and integers, free of torch and of any instruction set.
#pragma once
#include <cstdint>

namespace ringattn {

enum class Dtype : int { float32, bfloat16, float16 };

// A tensor (batch, rows, heads, dim) whose last dim is contiguous; strides count elements.
template <class Pointer>
struct TensorView {
  Pointer data;
  int64_t batch, row, head;
};
using InputView = TensorView<const void*>;   // of the problem's dtype
using AccumulatorView = TensorView<float*>;  // accumulators
using RowStatView = TensorView<float*>;      // (batch, heads, rows), a number a row

// Queries [q_start, q_stop) attend to keys [k_start, k_stop) where lo <= j - i <= hi, in every batch row, or in one.
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

// Queries of one interval, all of which see the same tiles, and none other.
struct QuerySegment {
  int64_t q_start, q_stop;
  const Tile* const* tiles;
  int64_t num_tiles;
};

// Query blocks [first, first + count) of a segment, for all heads of one kv head: block i is block i / group of the
// rows, for head i % group. So blocks next to each other share keys.
struct ForwardTask {
  int64_t batch, kv_head;
  const QuerySegment* segment;
  int64_t first, count;
};

// Keys [k_start, k_stop) against all queries that see them. dq may be a private accumulator of the task's part.
struct BackwardTask {
  int64_t batch, kv_head, k_start, k_stop;
  const QuerySegment* segments;
  int64_t num_segments;
  AccumulatorView dq;
};

// A few query rows of each sequence against keys in pages. A pool's `batch` stride is that of its pages, `row` that of
// the slots in one.
struct DecodeParams {
  InputView q, k, v;
  const int32_t *pages, *slots;  // (entries), and the position in each slot (entries, page_size)
  const int32_t *first, *stop;   // the positions that each row sees, (batch, tokens)
  int64_t tokens, page_size, heads, kv_heads, dim, v_dim;
  Dtype dtype;
  float scale;
  float softcap;  // 0: none
  int64_t group() const { return heads / kv_heads; }
};

// Entries [first, stop) of a sequence, for all query rows of one kv head: row i is token i / group, head i % group.
// What is found is written to out (rows, v_dim) and lse (rows).
struct DecodeTask {
  int64_t batch, kv_head, first, stop;
  float *out, *lse;
};

// One instruction set's kernels. Scratch is in bytes, aligned to 64.
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
