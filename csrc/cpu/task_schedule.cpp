#include "task_schedule.h"

#include <algorithm>

namespace ringattn {
namespace {

// The number of visible pairs (i, j) of a tile with j < key.
int64_t area_below(const Tile& t, int64_t key) {
  const int64_t stop = std::min(t.k_stop, key);
  // Row i sees keys from max(k_start, i + lo) to min(stop, i + hi + 1). Both bounds are clipped lines in i.
  auto sum_of_clipped = [&](int64_t shift, int64_t low, int64_t high) {
    // The sum over i in [q_start, q_stop) of clip(i + shift, low, high).
    const int64_t first = std::clamp(low - shift, t.q_start, t.q_stop);
    const int64_t last = std::clamp(high - shift, first, t.q_stop);
    const int64_t rising = (last - first) * (first + last - 1) / 2 + (last - first) * shift;
    return (first - t.q_start) * low + rising + (t.q_stop - last) * high;
  };
  if (stop <= t.k_start) return 0;
  return sum_of_clipped(t.hi + 1, t.k_start, stop) - sum_of_clipped(t.lo, t.k_start, stop);
}

int64_t area_below(const std::vector<const Tile*>& tiles, int64_t key) {
  int64_t sum = 0;
  for (const Tile* tile : tiles) sum += area_below(*tile, key);
  return sum;
}

// An upper bound of the keys that queries [row, stop) of a segment see.
int64_t max_visible_keys(const QuerySegment& segment, int64_t row, int64_t stop) {
  int64_t keys = 0;
  for (int64_t i = 0; i < segment.num_tiles; ++i) {
    const Tile& t = *segment.tiles[i];
    keys += std::max<int64_t>(0, std::min(t.k_stop, stop + t.hi) - std::max(t.k_start, row + t.lo));
  }
  return keys;
}

// The smallest key in [low, high] below which at least part / parts of the area lies.
int64_t split_point(const std::vector<const Tile*>& tiles, int64_t low, int64_t high, int64_t part, int64_t parts) {
  const int64_t total = area_below(tiles, high);
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (area_below(tiles, middle) * parts < total * part) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace

TaskSchedule::TaskSchedule(const int64_t* table, int64_t n, int64_t batch) {
  tiles_.resize(n);
  bool shared = true;  // by all batch rows
  for (int64_t i = 0; i < n; ++i) {
    const int64_t* t = table + 7 * i;
    // Diagonals beyond the tile's corners mean the same as the corners, but sums with them could overflow.
    const int64_t lowest = t[2] - t[1], highest = t[3] - t[0];
    tiles_[i] = {t[0], t[1], t[2], t[3], std::clamp(t[4], lowest, highest), std::clamp(t[5], lowest, highest), t[6]};
    shared &= t[6] < 0;
  }
  for (int64_t row = 0; row < (shared ? 1 : batch); ++row) segments_.push_back(make_segments(tiles_of(row)));
}

std::vector<const Tile*> TaskSchedule::tiles_of(int64_t batch_row) const {
  std::vector<const Tile*> tiles;
  for (const Tile& tile : tiles_) {
    if (tile.batch < 0 || tile.batch == batch_row) tiles.push_back(&tile);
  }
  return tiles;
}

std::vector<QuerySegment> TaskSchedule::make_segments(std::vector<const Tile*> tiles) {
  std::vector<int64_t> cuts;  // every tile's ends
  for (const Tile* tile : tiles) {
    cuts.push_back(tile->q_start);
    cuts.push_back(tile->q_stop);
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  std::stable_sort(tiles.begin(), tiles.end(), [](auto* a, auto* b) { return a->q_start < b->q_start; });
  std::vector<QuerySegment> segments;
  std::vector<const Tile*> active;
  size_t next = 0;
  for (size_t c = 0; c + 1 < cuts.size(); ++c) {
    auto ended = std::remove_if(active.begin(), active.end(), [&](auto* t) { return t->q_stop <= cuts[c]; });
    active.erase(ended, active.end());
    while (next < tiles.size() && tiles[next]->q_start <= cuts[c]) active.push_back(tiles[next++]);
    if (active.empty()) continue;
    segment_tiles_.push_back(active);
    segments.push_back({cuts[c], cuts[c + 1], segment_tiles_.back().data(), (int64_t)active.size()});
  }
  return segments;
}

std::vector<ForwardTask> TaskSchedule::forward_tasks(const AttentionParams& p, const KernelTable& kernels) const {
  const int64_t max_count = kernels.blocks_per_task(p), rows = kernels.block_rows;
  std::vector<std::pair<int64_t, ForwardTask>> weighted;  // (work, task)
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    for (const QuerySegment& segment : segments(batch)) {
      const int64_t blocks = (segment.q_stop - segment.q_start + rows - 1) / rows * p.group();
      for (int64_t first = 0; first < blocks; first += max_count) {
        const int64_t count = std::min(max_count, blocks - first);
        const int64_t row = segment.q_start + first / p.group() * rows;
        const int64_t stop = std::min(segment.q_start + ((first + count - 1) / p.group() + 1) * rows, segment.q_stop);
        const int64_t work = count * max_visible_keys(segment, row, stop);
        for (int64_t head = 0; head < p.kv_heads; ++head) {
          weighted.push_back({work, {batch, head, &segment, first, count}});
        }
      }
    }
  }
  std::stable_sort(weighted.begin(), weighted.end(), [](auto& a, auto& b) { return a.first > b.first; });
  std::vector<ForwardTask> tasks;
  for (auto& [work, task] : weighted) tasks.push_back(task);
  return tasks;
}

int64_t TaskSchedule::num_key_splits(const AttentionParams& p, int64_t threads) {
  constexpr int64_t max_splits = 8;
  const int64_t heads = p.batch * p.kv_heads;
  for (int64_t splits = 1; splits < max_splits; ++splits) {
    // Accept when threads are busy for at least 9/10 of the rounds.
    const int64_t rounds = (heads * splits + threads - 1) / threads;
    if (heads * splits * 10 >= rounds * threads * 9) return splits;
  }
  return max_splits;
}

std::vector<BackwardTask> TaskSchedule::backward_tasks(const AttentionParams& p,
                                                       const std::vector<AccumulatorView>& dq) const {
  const int64_t splits = dq.size();
  std::vector<BackwardTask> tasks;
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    const std::vector<QuerySegment>& here = segments(batch);
    if (here.empty()) continue;
    const std::vector<const Tile*> tiles = tiles_of(batch);
    int64_t start = tiles[0]->k_start, k_stop = tiles[0]->k_stop;
    for (const Tile* tile : tiles) {
      start = std::min(start, tile->k_start);
      k_stop = std::max(k_stop, tile->k_stop);
    }
    for (int64_t split = 0; split < splits; ++split) {
      const int64_t stop = split + 1 < splits ? split_point(tiles, start, k_stop, split + 1, splits) : k_stop;
      for (int64_t head = 0; start < stop && head < p.kv_heads; ++head) {
        tasks.push_back({batch, head, start, stop, here.data(), (int64_t)here.size(), dq[split]});
      }
      start = stop;
    }
  }
  return tasks;
}

}  // namespace ringattn
