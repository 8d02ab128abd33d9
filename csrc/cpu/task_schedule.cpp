#include "task_schedule.h"

#include <algorithm>

namespace ringattn {
namespace {

// Pairs (i, j) of a tile with j below `key`.
int64_t area_below(const Tile& t, int64_t key) {
  const int64_t stop = std::min(t.k_stop, key);
  // Rows see keys from max(k_start, i + lo) up to min(stop, i + hi + 1): clipped lines, summed up over three ranges.
  auto sum_of_clipped = [&](int64_t shift, int64_t low, int64_t high) {
    // Sum over i in [q_start, q_stop) of clip(i + shift, low, high).
    const int64_t first = std::clamp(low - shift, t.q_start, t.q_stop),
                  last = std::clamp(high - shift, first, t.q_stop);
    const int64_t rising = (last - first) * (first + last - 1) / 2 + (last - first) * shift;
    return (first - t.q_start) * low + rising + (t.q_stop - last) * high;
  };
  if (stop <= t.k_start) return 0;
  return sum_of_clipped(t.hi + 1, t.k_start, stop) - sum_of_clipped(t.lo, t.k_start, stop);
}

}  // namespace

TaskSchedule::TaskSchedule(const int64_t* table, int64_t n, int64_t batch) {
  tiles_.resize(n);
  bool same = true;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t* t = table + 7 * i;
    // Diagonals beyond the tile's corners say no more than the corners do, but sums of them may overflow.
    const int64_t lowest = t[2] - t[1], highest = t[3] - t[0];
    tiles_[i] = {t[0], t[1], t[2], t[3], std::clamp(t[4], lowest, highest), std::clamp(t[5], lowest, highest), t[6]};
    same &= t[6] < 0;
  }
  for (int64_t row = 0; row < (same ? 1 : batch); ++row) {
    std::vector<const Tile*> here;
    for (const Tile& tile : tiles_) {
      if (tile.batch < 0 || tile.batch == row) here.push_back(&tile);
    }
    rows_.push_back(cut(std::move(here)));
  }
}

std::vector<QuerySegment> TaskSchedule::cut(std::vector<const Tile*> tiles) {
  std::vector<int64_t> cuts;
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
    active.erase(std::remove_if(active.begin(), active.end(), [&](auto* t) { return t->q_stop <= cuts[c]; }),
                 active.end());
    while (next < tiles.size() && tiles[next]->q_start <= cuts[c]) active.push_back(tiles[next++]);
    if (active.empty()) continue;
    lists_.push_back(active);
    segments.push_back({cuts[c], cuts[c + 1], lists_.back().data(), (int64_t)active.size()});
  }
  return segments;
}

std::vector<ForwardTask> TaskSchedule::forward(const AttentionParams& p, const KernelTable& kernels) const {
  const int64_t most = kernels.blocks_per_task(p), rows = kernels.block_rows;
  std::vector<std::pair<int64_t, ForwardTask>> found;
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    for (const QuerySegment& segment : segments(batch)) {
      const int64_t blocks = (segment.q_stop - segment.q_start + rows - 1) / rows * p.group();
      for (int64_t first = 0; first < blocks; first += most) {
        const int64_t count = std::min(most, blocks - first);
        const int64_t row = segment.q_start + first / p.group() * rows;
        const int64_t stop = std::min(segment.q_start + ((first + count - 1) / p.group() + 1) * rows, segment.q_stop);
        int64_t work = 0;
        for (int64_t i = 0; i < segment.num_tiles; ++i) {
          const Tile& t = *segment.tiles[i];
          work += count * std::max<int64_t>(0, std::min(t.k_stop, stop + t.hi) - std::max(t.k_start, row + t.lo));
        }
        for (int64_t head = 0; head < p.kv_heads; ++head)
          found.push_back({work, {batch, head, &segment, first, count}});
      }
    }
  }
  std::stable_sort(found.begin(), found.end(), [](auto& a, auto& b) { return a.first > b.first; });
  std::vector<ForwardTask> tasks;
  for (auto& [work, task] : found) tasks.push_back(task);
  return tasks;
}

int64_t TaskSchedule::num_parts(const AttentionParams& p, int64_t threads) {
  const int64_t heads = p.batch * p.kv_heads;
  for (int64_t parts = 1; parts < 8; ++parts) {
    const int64_t rounds = (heads * parts + threads - 1) / threads;
    if (heads * parts * 10 >= rounds * threads * 9) return parts;
  }
  return 8;
}

std::vector<BackwardTask> TaskSchedule::backward(const AttentionParams& p,
                                                 const std::vector<AccumulatorView>& dq) const {
  const int64_t parts = dq.size();
  std::vector<BackwardTask> tasks;
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    const std::vector<QuerySegment>& here = segments(batch);
    if (here.empty()) continue;
    std::vector<const Tile*> tiles;
    for (const Tile& tile : tiles_) {
      if (tile.batch < 0 || tile.batch == batch) tiles.push_back(&tile);
    }
    auto area = [&](int64_t key) {
      int64_t sum = 0;
      for (const Tile* tile : tiles) sum += area_below(*tile, key);
      return sum;
    };
    int64_t first = tiles[0]->k_start, stop = tiles[0]->k_stop;
    for (const Tile* tile : tiles) {
      first = std::min(first, tile->k_start);
      stop = std::max(stop, tile->k_stop);
    }
    const int64_t total = parts > 1 ? area(stop) : 0;
    int64_t start = first;
    for (int64_t part = 0; part < parts; ++part) {
      int64_t low = start, high = stop;
      while (part + 1 < parts && low < high) {
        const int64_t middle = (low + high) / 2;
        if (area(middle) * parts < total * (part + 1)) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      for (int64_t head = 0; start < high && head < p.kv_heads; ++head) {
        tasks.push_back({batch, head, start, high, here.data(), (int64_t)here.size(), dq[part]});
      }
      start = high;
    }
  }
  return tasks;
}

}  // namespace ringattn
