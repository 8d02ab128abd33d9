// Products of small matrices in registers, and turning rows into lanes.
#pragma once
#include "dot_traits.h"

namespace ringattn::RINGATTN_ISA {

constexpr int BLOCK_M_VECS = 3;                             // vectors of a block of queries
constexpr int BLOCK_M = BLOCK_M_VECS * LANES;               // queries of a block: the lanes of every matrix below
constexpr int TILE_ROWS = NUM_ACCUMULATORS / BLOCK_M_VECS;  // rows of a tile of a product over a block
constexpr int MAX_TILE_ROWS = NUM_ACCUMULATORS;             // a multiple of the rows of every tile over queries

// sums[r][c] += sum over t of a[r * a_row + t * a_step] * b[t * b_step + c], for R rows and C vectors of columns.
template <class Dot, int R, int C>
RINGATTN_INLINE void multiply(vec (&sums)[R][C], const float* a, int64_t a_row, int64_t a_step, const float* b,
                              int64_t b_step, int64_t steps) {
  for (int64_t t = 0; t < steps; ++t) {
    vec columns[C];
    RINGATTN_UNROLL
    for (int c = 0; c < C; ++c) columns[c] = load(b + c * LANES);
    RINGATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      const vec x = broadcast(a[r * a_row]);
      RINGATTN_UNROLL
      for (int c = 0; c < C; ++c) sums[r][c] = Dot::dot(x, columns[c], sums[r][c]);
    }
    a += a_step;
    b += b_step;
  }
}

template <int R, int C>
RINGATTN_INLINE void fill(vec (&sums)[R][C], vec x) {
  RINGATTN_UNROLL
  for (int r = 0; r < R; ++r) {
    RINGATTN_UNROLL
    for (int c = 0; c < C; ++c) sums[r][c] = x;
  }
}

// Turns n rows of `words` words into columns: to[w * BLOCK_M + i] = from[i * pitch + w]. Columns from n on, up to a
// whole vector, become zero.
RINGATTN_INLINE void transpose_to_lanes(float* to, const float* from, int64_t pitch, int64_t n, int64_t words) {
  for (int64_t i = 0; i < n; i += LANES) {
    for (int64_t w = 0; w < words; w += LANES) {
      const float* corner = from + i * pitch + w;
      float* turned = to + w * BLOCK_M + i;
      vec block[LANES];
      if (i + LANES <= n && w + LANES <= words) {
        RINGATTN_UNROLL
        for (int r = 0; r < LANES; ++r) block[r] = load(corner + r * pitch);
        transpose(block);
        RINGATTN_UNROLL
        for (int r = 0; r < LANES; ++r) store(turned + r * BLOCK_M, block[r]);
      } else {
        const int64_t here = min(LANES, words - w);
        for (int r = 0; r < LANES; ++r) block[r] = i + r < n ? load(corner + r * pitch, here) : vec{};
        transpose(block);
        for (int r = 0; r < here; ++r) store(turned + r * BLOCK_M, block[r]);
      }
    }
  }
}

// Calls put(row, first, values, count) for pieces of the rows of a matrix whose columns are from[w * BLOCK_M + i].
template <class Put>
RINGATTN_INLINE void transpose_from_lanes(const float* from, int64_t n, int64_t words, const Put& put) {
  for (int64_t i = 0; i < n; i += LANES) {
    for (int64_t w = 0; w < words; w += LANES) {
      const float* corner = from + w * BLOCK_M + i;
      vec block[LANES];
      if (i + LANES <= n && w + LANES <= words) {
        RINGATTN_UNROLL
        for (int r = 0; r < LANES; ++r) block[r] = load(corner + r * BLOCK_M);
        transpose(block);
        RINGATTN_UNROLL
        for (int r = 0; r < LANES; ++r) put(i + r, w, block[r], LANES);
      } else {
        const int64_t count = min(LANES, words - w);
        for (int r = 0; r < LANES; ++r) block[r] = r < count ? load(corner + r * BLOCK_M) : vec{};
        transpose(block);
        for (int r = 0; r < LANES && i + r < n; ++r) put(i + r, w, block[r], count);
      }
    }
  }
}

// Which of a block's lanes may attend to a key: those in [first, last].
struct LaneRange {
  int32_t first, last;
  RINGATTN_INLINE ivec mask(const LaneRange& range, int c) {
    const ivec lane = lane_indices() + c * LANES;
    return (lane >= broadcast(range.first)) & (lane <= broadcast(range.last));
  }
};

// A block of queries [row, stop) against the keys of a chunk, [start, start + n), through one tile of the mask.
struct BandMask {
  int64_t row, stop, start, n;
  const Tile& tile;

  // The first and last key, counted from the chunk's start, that any query of the block sees.
  int64_t begin() const { return max(0, max(tile.k_start, row + tile.lo) - start); }
  int64_t end() const { return min(n, min(tile.k_stop, stop + tile.hi) - start); }

  // Whether all queries of the block see all of `count` keys from key j of the chunk on.
  bool whole(int64_t j, int64_t count) const {
    return start + j >= max(tile.k_start, stop - 1 + tile.lo) && j + count <= n &&
           start + j + count <= min(tile.k_stop, row + tile.hi + 1);
  }

  LaneRange lanes(int64_t j) const {
    const int64_t key = start + j;
    if (j >= n || key < tile.k_start || key >= tile.k_stop) return {1, 0};
    const int64_t first = max(0, key - tile.hi - row), last = min(BLOCK_M - 1, key - tile.lo - row);
    return first <= last ? LaneRange{(int32_t)first, (int32_t)last} : LaneRange{1, 0};
  }

  // The same of `count` vectors of the block's queries.
  BandMask part(int64_t vector, int64_t count) const {
    return {row + vector * LANES, min(stop, row + (vector + count) * LANES), start, n, tile};
  }
};

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls visit(Count, vector, begin, end) for runs of keys, whole tiles of them, and the vectors of queries that see any
// of them. Along a diagonal a run has as many keys as a vector lanes, and nothing is computed for the vectors beyond.
template <class Visit>
RINGATTN_INLINE void for_each_visible_run(const BandMask& band, const Visit& visit) {
  int64_t begins[BLOCK_M_VECS], ends[BLOCK_M_VECS];
  int64_t first = 0, last = (band.stop - band.row + LANES - 1) / LANES;
  for (int64_t c = 0; c < last; ++c) {
    const BandMask part = band.part(c, 1);
    const int64_t begin = part.begin(), end = part.end();
    begins[c] = begin / TILE_ROWS * TILE_ROWS;
    ends[c] = begin < end ? round_up(end, TILE_ROWS) : begins[c];
  }
  // Neither begins nor ends ever fall from a vector to the next.
  while (first < last && begins[first] >= ends[first]) ++first;
  while (first < last && begins[last - 1] >= ends[last - 1]) --last;
  for (int64_t at = first < last ? begins[first] : 0; first < last;) {
    int64_t stop = first + 1;
    while (stop < last && begins[stop] <= at) ++stop;
    const int64_t end = stop < last ? min(ends[first], begins[stop]) : ends[first];
    if (stop - first == BLOCK_M_VECS) {
      visit(Count<BLOCK_M_VECS>{}, first, at, end);
    } else if (stop - first == 2) {
      visit(Count<2>{}, first, at, end);
    } else {
      visit(Count<1>{}, first, at, end);
    }
    at = end;
    while (first < last && ends[first] <= at) ++first;
    if (first < last) at = max(at, begins[first]);
  }
}

// Memory handed out piece by piece, each aligned to a cache line.
struct Arena {
  char* base;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* piece = reinterpret_cast<float*>(base + used);
    used += round_up(floats * (int64_t)sizeof(float), 64);
    return piece;
  }
};

}  // namespace ringattn::RINGATTN_ISA
