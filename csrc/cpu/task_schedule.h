// From a list of tiles to tasks for threads: integers only.
#pragma once
#include <vector>

#include "params.h"

namespace ringattn {

// Tiles cut into segments, for each batch row, or once for all of them.
class Schedule {
 public:
  // tiles: (n, 7) integers, as in ringattn/geometry/tiles.py.
  Schedule(const int64_t* tiles, int64_t n, int64_t batch);
  Schedule(Schedule&&) = default;  // segments point into it: moved, never copied

  const std::vector<Segment>& segments(int64_t batch_row) const {
    return rows_.size() == 1 ? rows_[0] : rows_[batch_row];
  }

  // Largest first, so that threads finish together.
  std::vector<ForwardTask> forward(const Problem& p, const Kernels& kernels) const;

  // Into how many parts keys must be cut so that so many threads have work alike.
  static int64_t num_parts(const Problem& p, int64_t threads);

  // Each head's keys cut into parts of even work. Part n writes to dq[n].
  std::vector<BackwardTask> backward(const Problem& p, const std::vector<State>& dq) const;

 private:
  std::vector<Segment> cut(std::vector<const Tile*> tiles);

  std::vector<Tile> tiles_;
  std::vector<std::vector<Segment>> rows_;
  std::vector<std::vector<const Tile*>> lists_;  // of the segments' tiles, which point here
};

}  // namespace ringattn
