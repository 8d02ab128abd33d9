// The mask of one query block against one key block: which keys to compute, and which lanes to mask.
#pragma once
#include "microkernel.h"
#include "params.h"

namespace ringattn::RINGATTN_ISA {

// Lanes [first, last] of a query block.
struct LaneRange {
  int32_t first, last;
  // The mask of the block's vector c.
  RINGATTN_INLINE ivec mask(const LaneRange& range, int c) {
    const ivec lane = lane_indices() + c * LANES;
    return (lane >= broadcast(range.first)) & (lane <= broadcast(range.last));
  }
};

// Queries [row, stop) of a query block against keys [start, start + n) of a key block, restricted to one mask tile.
// Key numbers count from `start`.
struct BandMask {
  int64_t row, stop, start, n;
  const Tile& tile;

  // Every query of the block sees only keys in [begin(), end()).
  int64_t begin() const { return max(0, max(tile.k_start, row + tile.lo) - start); }
  int64_t end() const { return min(n, min(tile.k_stop, stop + tile.hi) - start); }

  // Whether every query of the block sees all keys [j, j + count).
  bool all_visible(int64_t j, int64_t count) const {
    return start + j >= max(tile.k_start, stop - 1 + tile.lo) && j + count <= n &&
           start + j + count <= min(tile.k_stop, row + tile.hi + 1);
  }

  // The lanes whose queries see key j. An empty range is {1, 0}.
  LaneRange visible_lanes(int64_t j) const {
    const int64_t key = start + j;
    if (j >= n || key < tile.k_start || key >= tile.k_stop) return {1, 0};
    const int64_t first = max(0, key - tile.hi - row), last = min(BLOCK_M - 1, key - tile.lo - row);
    return first <= last ? LaneRange{(int32_t)first, (int32_t)last} : LaneRange{1, 0};
  }

  // The mask of `count` vectors of the query block, from vector `first` on.
  BandMask vectors(int64_t first, int64_t count) const {
    return {row + first * LANES, min(stop, row + (first + count) * LANES), start, n, tile};
  }
};

// Calls visit(count, vector, begin, end) for runs of keys [begin, end), multiples of TILE_ROWS, and the `count` vectors
// of queries from `vector` on that see any of them. `count` is a std::integral_constant. Along a diagonal a run is
// about LANES keys long, and vectors whose queries see none of its keys are left out.
template <class Visit>
RINGATTN_INLINE void for_each_visible_run(const BandMask& mask, const Visit& visit) {
  int64_t begins[BLOCK_M_VECS] = {}, ends[BLOCK_M_VECS] = {};  // the keys that each vector sees
  int64_t first = 0, last = (mask.stop - mask.row + LANES - 1) / LANES;
  for (int64_t c = 0; c < last; ++c) {
    const BandMask vector = mask.vectors(c, 1);
    const int64_t begin = vector.begin(), end = vector.end();
    begins[c] = begin / TILE_ROWS * TILE_ROWS;
    ends[c] = begin < end ? round_up(end, TILE_ROWS) : begins[c];
  }
  // Neither begins nor ends decrease from one vector to the next.
  while (first < last && begins[first] >= ends[first]) ++first;
  while (first < last && begins[last - 1] >= ends[last - 1]) --last;
  for (int64_t key = first < last ? begins[first] : 0; first < last;) {
    int64_t stop = first + 1;
    while (stop < last && begins[stop] <= key) ++stop;
    const int64_t end = stop < last ? min(ends[first], begins[stop]) : ends[first];
    if (stop - first == BLOCK_M_VECS) {
      visit(std::integral_constant<int, BLOCK_M_VECS>{}, first, key, end);
    } else if (stop - first == 2) {
      visit(std::integral_constant<int, 2>{}, first, key, end);
    } else {
      visit(std::integral_constant<int, 1>{}, first, key, end);
    }
    key = end;
    while (first < last && ends[first] <= key) ++first;
    if (first < last) key = max(key, begins[first]);
  }
}

}  // namespace ringattn::RINGATTN_ISA
