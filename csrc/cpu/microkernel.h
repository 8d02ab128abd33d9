// Matrix products in registers (the microkernel), and transposes between row-major and lane layouts.
//
// A block of BLOCK_M queries is stored transposed: a matrix (n, BLOCK_M) whose columns, the lanes of BLOCK_M_VECS
// vectors, are queries.
#pragma once
#include "dot_traits.h"

namespace ringattn::RINGATTN_ISA {

constexpr int BLOCK_M_VECS = 3;                             // vectors of a query block
constexpr int BLOCK_M = BLOCK_M_VECS * LANES;               // queries of a query block
constexpr int TILE_ROWS = NUM_ACCUMULATORS / BLOCK_M_VECS;  // rows of a register tile whose columns are a query block
constexpr int MAX_TILE_ROWS = NUM_ACCUMULATORS;             // a multiple of the rows of every register tile

// The microkernel. For R rows and C vectors of columns:
// acc[r][c] += sum over t of a[r * a_row + t * a_step] * b[t * b_step + c].
template <class Dot, int R, int C>
RINGATTN_INLINE void multiply_accumulate(vec (&acc)[R][C], const float* a, int64_t a_row, int64_t a_step,
                                         const float* b, int64_t b_step, int64_t steps) {
  for (int64_t t = 0; t < steps; ++t) {
    vec columns[C];
    RINGATTN_UNROLL
    for (int c = 0; c < C; ++c) columns[c] = load(b + c * LANES);
    RINGATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      const vec x = broadcast(a[r * a_row]);
      RINGATTN_UNROLL
      for (int c = 0; c < C; ++c) acc[r][c] = Dot::dot(x, columns[c], acc[r][c]);
    }
    a += a_step;
    b += b_step;
  }
}

template <int R, int C>
RINGATTN_INLINE void fill(vec (&acc)[R][C], vec x) {
  RINGATTN_UNROLL
  for (int r = 0; r < R; ++r) {
    RINGATTN_UNROLL
    for (int c = 0; c < C; ++c) acc[r][c] = x;
  }
}

// Transposes n rows of `words` words: to[w * BLOCK_M + i] = from[i * pitch + w]. Lanes from n to the next multiple of
// LANES become zero.
RINGATTN_INLINE void transpose_to_lanes(float* to, const float* from, int64_t pitch, int64_t n, int64_t words) {
  for (int64_t i = 0; i < n; i += LANES) {
    for (int64_t w = 0; w < words; w += LANES) {
      const float* source = from + i * pitch + w;
      float* target = to + w * BLOCK_M + i;
      vec block[LANES];
      if (i + LANES <= n && w + LANES <= words) {
        RINGATTN_UNROLL
        for (int r = 0; r < LANES; ++r) block[r] = load(source + r * pitch);
        transpose(block);
        RINGATTN_UNROLL
        for (int r = 0; r < LANES; ++r) store(target + r * BLOCK_M, block[r]);
      } else {
        const int64_t count = min(LANES, words - w);
        for (int r = 0; r < LANES; ++r) block[r] = i + r < n ? load(source + r * pitch, count) : vec{};
        transpose(block);
        for (int r = 0; r < count; ++r) store(target + r * BLOCK_M, block[r]);
      }
    }
  }
}

// The inverse. Calls put(row, first, values, count) for up to LANES words of a row at a time: values[x] is
// from[(first + x) * BLOCK_M + row] for x < count.
template <class Put>
RINGATTN_INLINE void transpose_from_lanes(const float* from, int64_t n, int64_t words, const Put& put) {
  for (int64_t i = 0; i < n; i += LANES) {
    for (int64_t w = 0; w < words; w += LANES) {
      const float* source = from + w * BLOCK_M + i;
      vec block[LANES];
      if (i + LANES <= n && w + LANES <= words) {
        RINGATTN_UNROLL
        for (int r = 0; r < LANES; ++r) block[r] = load(source + r * BLOCK_M);
        transpose(block);
        RINGATTN_UNROLL
        for (int r = 0; r < LANES; ++r) put(i + r, w, block[r], LANES);
      } else {
        const int64_t count = min(LANES, words - w);
        for (int r = 0; r < LANES; ++r) block[r] = r < count ? load(source + r * BLOCK_M) : vec{};
        transpose(block);
        for (int r = 0; r < LANES && i + r < n; ++r) put(i + r, w, block[r], count);
      }
    }
  }
}

}  // namespace ringattn::RINGATTN_ISA
