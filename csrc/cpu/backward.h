// Backward: scores are computed anew, weighed by the final lse, and each block's products go to dq, dk and dv.
//
// Blocks of queries stay in cache while chunks of keys go by, as in the forward: dq is written once per task, dk and
// dv once per chunk and task. Everything that is summed over queries has keys as rows and dims as lanes.
#pragma once
#include "microkernel.h"

namespace ringattn::RINGATTN_ISA {

template <class Dot>
struct Backward {
  static constexpr int64_t BLOCK_N = 96;        // keys
  static constexpr int64_t PREFETCH_ROWS = 24;  // of them, while a block computes
  static constexpr int PACK_FACTOR = Dot::PACK_FACTOR;
  static constexpr int64_t ALONG = BLOCK_M / PACK_FACTOR;  // words of a row of weights

  struct Sizes {
    int64_t k_words, v_words;
    int64_t k_pitch, v_pitch;        // rows of k and v, in words; whole vectors
    int64_t dim_pitch, v_dim_pitch;  // rows of fp32, or of stacked rows; whole vectors and whole tiles
    int64_t blocks;
    explicit Sizes(const AttentionParams& p)
        : k_words((p.dim + PACK_FACTOR - 1) / PACK_FACTOR),
          v_words((p.v_dim + PACK_FACTOR - 1) / PACK_FACTOR),
          k_pitch(round_up(k_words, LANES)),
          v_pitch(round_up(v_words, LANES)),
          dim_pitch(round_up(round_up(p.dim, LANES), TILE_ROWS)),
          v_dim_pitch(round_up(round_up(p.v_dim, LANES), TILE_ROWS)),
          blocks(max(1, min(8, (640 << 10) / (4 * block_floats())))) {}
    int64_t block_floats() const {
      return BLOCK_M * (k_words + v_words + dim_pitch + 2) + BLOCK_M / PACK_FACTOR * (dim_pitch + v_dim_pitch);
    }
  };

  struct Block {
    int64_t head, row, stop;
    float *q, *dout;            // lanes are queries: (words, BLOCK_M)
    float *q_rows, *dout_rows;  // lanes are dims: (BLOCK_M / PACK_FACTOR, pitch)
    float* dq;                  // (dim_pitch, BLOCK_M)
    float *lse, *delta;         // (BLOCK_M), lse in powers of two

    // The same without the first vectors of queries.
    Block from(int64_t vector, const Sizes& s) const {
      const int64_t lane = vector * LANES, word = lane / PACK_FACTOR;
      Block b = *this;
      b.row += lane, b.q += lane, b.dout += lane, b.dq += lane, b.lse += lane, b.delta += lane;
      b.q_rows += word * s.dim_pitch, b.dout_rows += word * s.v_dim_pitch;
      return b;
    }
  };

  static int64_t scratch(const AttentionParams& p) {
    const Sizes s(p);
    const int64_t floats = s.blocks * s.block_floats() + BLOCK_N * (s.k_pitch + s.v_pitch + s.dim_pitch) +
                           (BLOCK_N + MAX_TILE_ROWS) * (s.dim_pitch + s.v_dim_pitch + 3 * BLOCK_M) +
                           TILE_ROWS * BLOCK_M + BLOCK_M * max(s.k_pitch, s.v_pitch);
    return 4 * floats + 64 * (16 + 8 * s.blocks) + s.blocks * (int64_t)sizeof(Block);
  }

  const AttentionParams& p;
  const BackwardTask& task;
  const Sizes s;
  float *k, *v, *k_stacked, *dk, *dv, *weights, *weights_along, *ds_along, *ds_across, *slopes, *rows;
  Block* blocks;

  Backward(const AttentionParams& problem, const BackwardTask& t, void* memory) : p(problem), task(t), s(problem) {
    Arena arena{static_cast<char*>(memory)};
    constexpr bool wide = PACK_FACTOR == 1;
    k = arena.take(BLOCK_N * s.k_pitch);
    v = arena.take(BLOCK_N * s.v_pitch);
    k_stacked = wide ? k : arena.take(BLOCK_N / 2 * s.dim_pitch);
    dk = arena.take((BLOCK_N + MAX_TILE_ROWS) * s.dim_pitch);
    dv = arena.take((BLOCK_N + MAX_TILE_ROWS) * s.v_dim_pitch);
    weights = arena.take((BLOCK_N + MAX_TILE_ROWS) * BLOCK_M);
    ds_along = arena.take((BLOCK_N + MAX_TILE_ROWS) * BLOCK_M);
    weights_along = wide ? weights : arena.take((BLOCK_N + MAX_TILE_ROWS) * ALONG);
    ds_across = wide ? ds_along : arena.take(BLOCK_N / 2 * BLOCK_M);
    slopes = arena.take(TILE_ROWS * BLOCK_M);
    rows = arena.take(BLOCK_M * max(s.k_pitch, s.v_pitch));
    blocks = reinterpret_cast<Block*>(arena.take(s.blocks * sizeof(Block) / 4 + 1));
    for (int64_t i = 0; i < s.blocks; ++i) {
      Block& b = blocks[i];
      b.q = arena.take(s.k_words * BLOCK_M);
      b.dout = arena.take(s.v_words * BLOCK_M);
      b.q_rows = arena.take(ALONG * s.dim_pitch);
      b.dout_rows = arena.take(ALONG * s.v_dim_pitch);
      b.dq = arena.take(s.dim_pitch * BLOCK_M);
      b.lse = arena.take(BLOCK_M);
      b.delta = arena.take(BLOCK_M);
    }
  }

  void run() {
    for (int64_t i = 0; i < task.num_segments; ++i) {
      const QuerySegment& segment = task.segments[i];
      const int64_t num_blocks = (segment.q_stop - segment.q_start + BLOCK_M - 1) / BLOCK_M * p.group();
      for (int64_t first = 0; first < num_blocks; first += s.blocks) {
        run(segment, first, min(s.blocks, num_blocks - first));
      }
    }
  }

  void run(const QuerySegment& segment, int64_t first_block, int64_t count) {
    const int64_t row = segment.q_start + first_block / p.group() * BLOCK_M;
    const int64_t stop = min(segment.q_start + ((first_block + count - 1) / p.group() + 1) * BLOCK_M, segment.q_stop);
    bool begun = false;
    for (int64_t i = 0; i < segment.num_tiles; ++i) {
      const Tile& tile = *segment.tiles[i];
      const int64_t first = max(max(tile.k_start, row + tile.lo), task.k_start);
      const int64_t last = min(min(tile.k_stop, stop + tile.hi), task.k_stop);
      for (int64_t start = first; start < last; start += BLOCK_N) {
        if (!begun) {
          for (int64_t b = 0; b < count; ++b) begin(blocks[b], segment, first_block + b);
          begun = true;
        }
        const int64_t n = min(BLOCK_N, last - start);
        begin_chunk(start, n);
        // While blocks compute with this chunk, its sums and the next one are asked of memory, a few rows for each.
        int64_t asked = start;
        for (int64_t b = 0; b < count; ++b) {
          const BandMask band{blocks[b].row, blocks[b].stop, start, n, tile};
          if (band.begin() >= band.end()) continue;
          for (const int64_t until = min(asked + PREFETCH_ROWS, start + n); asked < until; ++asked) {
            ask(asked, asked + BLOCK_N < last);
          }
          attend(blocks[b], band);
        }
        end_chunk(start, n);
      }
    }
    for (int64_t b = 0; begun && b < count; ++b) end(blocks[b]);
  }

  // Asks memory for the sums of a key, and for the key and value that come a chunk later.
  void ask(int64_t key, bool more) const {
    prefetch_row(p.dk, Dtype::float32, task.batch, key, task.kv_head, p.dim);
    prefetch_row(p.dv, Dtype::float32, task.batch, key, task.kv_head, p.v_dim);
    if (!more) return;
    prefetch_row(p.k, p.dtype, task.batch, key + BLOCK_N, task.kv_head, p.dim);
    prefetch_row(p.v, p.dtype, task.batch, key + BLOCK_N, task.kv_head, p.v_dim);
  }

  void begin(Block& b, const QuerySegment& segment, int64_t index) {
    b.row = segment.q_start + index / p.group() * BLOCK_M;
    b.stop = min(b.row + BLOCK_M, segment.q_stop);
    b.head = task.kv_head * p.group() + index % p.group();
    const int64_t n = b.stop - b.row;
    load_queries(p.q, b, p.dim, s.k_words, s.k_pitch, b.q, s.dim_pitch, b.q_rows);
    load_queries(p.dout, b, p.v_dim, s.v_words, s.v_pitch, b.dout, s.v_dim_pitch, b.dout_rows);
    for (int64_t i = 0; i < BLOCK_M; ++i) {
      const float lse = i < n ? of_query(p.lse, b, i) : 0.0f;
      // A query without any key has no weights.
      b.lse[i] = lse == -INF ? INF : lse * LOG2_E;
      b.delta[i] = i < n ? of_query(p.delta, b, i) : 0.0f;
    }
    for (int64_t i = 0; i < s.dim_pitch * BLOCK_M; i += LANES) store(b.dq + i, vec{});
  }

  void load_queries(const InputView& x, const Block& b, int64_t dim, int64_t words, int64_t pitch, float* lanes,
                    int64_t stacked_pitch, float* stacked) {
    const int64_t n = b.stop - b.row;
    Dot::copy_rows_vnni(stacked, stacked_pitch, {x, p.dtype, task.batch, b.head, b.row, n, BLOCK_M, dim});
    if (PACK_FACTOR == 1) {
      transpose_to_lanes(lanes, stacked, stacked_pitch, n, words);
    } else {
      Dot::copy_rows(rows, pitch, {x, p.dtype, task.batch, b.head, b.row, n, n, dim});
      transpose_to_lanes(lanes, rows, pitch, n, words);
    }
  }

  void end(const Block& b) {
    float* dq = task.dq.data + task.batch * task.dq.batch + b.row * task.dq.row + b.head * task.dq.head;
    transpose_from_lanes(b.dq, b.stop - b.row, p.dim, [&](int64_t i, int64_t d, vec values, int64_t count) {
      float* to = dq + i * task.dq.row + d;
      store(to, load(to, count) + values * p.scale, count);
    });
  }

  void begin_chunk(int64_t start, int64_t n) {
    const int64_t n_pad = round_up(n, TILE_ROWS);
    Dot::copy_rows(k, s.k_pitch, {p.k, p.dtype, task.batch, task.kv_head, start, n, n_pad, p.dim});
    Dot::copy_rows(v, s.v_pitch, {p.v, p.dtype, task.batch, task.kv_head, start, n, n_pad, p.v_dim});
    if (PACK_FACTOR == 2) {
      Dot::copy_rows_vnni(k_stacked, s.dim_pitch, {p.k, p.dtype, task.batch, task.kv_head, start, n, n_pad, p.dim});
    }
    for (int64_t i = 0; i < n * s.dim_pitch; i += LANES) store(dk + i, vec{});
    for (int64_t i = 0; i < n * s.v_dim_pitch; i += LANES) store(dv + i, vec{});
  }

  void end_chunk(int64_t start, int64_t n) {
    add(p.dk, start, n, dk, s.dim_pitch, p.dim, p.scale);
    add(p.dv, start, n, dv, s.v_dim_pitch, p.v_dim, 1.0f);
  }

  void add(const AccumulatorView& total, int64_t start, int64_t n, const float* part, int64_t pitch, int64_t dim,
           float scale) {
    float* to = total.data + task.batch * total.batch + start * total.row + task.kv_head * total.head;
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t e = 0; e < dim; ++e) to[j * total.row + e] += part[j * pitch + e] * scale;
    }
  }

  void attend(Block& b, const BandMask& band) {
    for_each_visible_run(band, [&](auto count, int64_t vector, int64_t begin, int64_t end) {
      Block part = b.from(vector, s);
      attend<count.value>(part, band.part(vector, count.value), begin, end);
    });
  }

  template <int C>
  void attend(Block& b, const BandMask& band, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j += TILE_ROWS) differentiate<C>(b, band, j);
    // The tiles of the sums over queries may reach beyond the last key.
    for (int64_t i = end * ALONG; i < (begin + round_up(end - begin, MAX_TILE_ROWS)) * ALONG; ++i) {
      weights_along[i] = ds_along[i] = 0;
    }
    sum_over_queries<C>(dv, s.v_dim_pitch, weights_along, b.dout_rows, begin, end);
    sum_over_queries<C>(dk, s.dim_pitch, ds_along, b.q_rows, begin, end);
    for (int64_t d = 0; d < p.dim; d += TILE_ROWS) {
      vec sums[TILE_ROWS][C];
      fill(sums, vec{});
      multiply<Dot>(sums, k_stacked + begin / PACK_FACTOR * stacked_pitch() + d, 1, stacked_pitch(),
                    ds_across + begin / PACK_FACTOR * BLOCK_M, BLOCK_M, (end - begin) / PACK_FACTOR);
      RINGATTN_UNROLL
      for (int r = 0; r < TILE_ROWS; ++r) {
        RINGATTN_UNROLL
        for (int c = 0; c < C; ++c) {
          float* dq = b.dq + (d + r) * BLOCK_M + c * LANES;
          store(dq, load(dq) + sums[r][c]);
        }
      }
    }
  }

  float of_query(const RowStatView& x, const Block& b, int64_t i) const {
    return x.data[task.batch * x.batch + (b.row + i) * x.row + b.head * x.head];
  }
  int64_t stacked_pitch() const { return PACK_FACTOR == 1 ? s.k_pitch : s.dim_pitch; }

  // Weights and gradients of scores for TILE_ROWS keys: p = 2 ** (score - lse), ds = p * (dout . v - delta).
  template <int C>
  void differentiate(const Block& b, const BandMask& band, int64_t j) {
    vec sums[TILE_ROWS][C];
    fill(sums, vec{});
    multiply<Dot>(sums, k + j * s.k_pitch, s.k_pitch, 1, b.q, BLOCK_M, s.k_words);
    const bool capped = p.softcap != 0.0f, masked = !band.whole(j, TILE_ROWS);
    if (__builtin_expect(capped, 0)) cap(sums);
    const vec factor = broadcast(capped ? 1.0f : p.scale * LOG2_E);
    RINGATTN_UNROLL
    for (int c = 0; c < C; ++c) {
      const vec lse = load(b.lse + c * LANES);
      RINGATTN_UNROLL
      for (int r = 0; r < TILE_ROWS; ++r) sums[r][c] = exp2(min_zero(fma(sums[r][c], factor, -lse)));
    }
    if (__builtin_expect(masked, 0)) mask(sums, band, j);
    RINGATTN_UNROLL
    for (int r = 0; r < TILE_ROWS; ++r) {
      RINGATTN_UNROLL
      for (int c = 0; c < C; ++c) store(weights + (j + r) * BLOCK_M + c * LANES, sums[r][c]);
    }
    RINGATTN_UNROLL
    for (int c = 0; c < C; ++c) {
      const vec delta = load(b.delta + c * LANES);
      RINGATTN_UNROLL
      for (int r = 0; r < TILE_ROWS; ++r) sums[r][c] = -delta;
    }
    multiply<Dot>(sums, v + j * s.v_pitch, s.v_pitch, 1, b.dout, BLOCK_M, s.v_words);
    RINGATTN_UNROLL
    for (int r = 0; r < TILE_ROWS; ++r) {
      RINGATTN_UNROLL
      for (int c = 0; c < C; ++c) sums[r][c] *= load(weights + (j + r) * BLOCK_M + c * LANES);
    }
    if (__builtin_expect(capped, 0)) {
      for (int r = 0; r < TILE_ROWS; ++r) {
        for (int c = 0; c < C; ++c) sums[r][c] *= load(slopes + r * BLOCK_M + c * LANES);
      }
    }
    if (__builtin_expect(masked, 0)) mask(sums, band, j);  // 0 x NaN, of a key that others may see
    RINGATTN_UNROLL
    for (int r = 0; r < TILE_ROWS; r += 2) {
      RINGATTN_UNROLL
      for (int c = 0; c < C; ++c) put(j + r, c, sums[r][c], sums[r + 1][c]);
    }
  }

  void put(int64_t j, int c, vec even, vec odd) {
    constexpr int along = LANES / PACK_FACTOR;
    Dot::store_rows(ds_along + j * ALONG + c * along, ALONG, even, odd);
    if constexpr (PACK_FACTOR == 2) {
      Dot::store_rows_vnni(ds_across + j / 2 * BLOCK_M + c * LANES, BLOCK_M, even, odd);
      const vec a = load(weights + j * BLOCK_M + c * LANES), z = load(weights + (j + 1) * BLOCK_M + c * LANES);
      Dot::store_rows(weights_along + j * ALONG + c * along, ALONG, a, z);
    }
  }

  template <int C>
  __attribute__((noinline)) void cap(vec (&sums)[TILE_ROWS][C]) {
    const float inner = p.scale / p.softcap, outer = p.softcap * LOG2_E;
    for (int r = 0; r < TILE_ROWS; ++r) {
      for (int c = 0; c < C; ++c) {
        const vec squashed = tanh(sums[r][c] * inner);
        store(slopes + r * BLOCK_M + c * LANES, 1.0f - squashed * squashed);
        sums[r][c] = squashed * outer;
      }
    }
  }

  template <int C>
  __attribute__((noinline)) void mask(vec (&sums)[TILE_ROWS][C], const BandMask& band, int64_t j) {
    for (int r = 0; r < TILE_ROWS; ++r) {
      const LaneRange lanes = band.lanes(j + r);
      for (int c = 0; c < C; ++c) sums[r][c] = select(LaneRange::mask(lanes, c), sums[r][c], vec{});
    }
  }

  // total[j] += sum over queries of weights[j][query] * rows[query], for keys begin to end.
  template <int C>
  void sum_over_queries(float* total, int64_t pitch, const float* factors, const float* query_rows, int64_t begin,
                        int64_t end) {
    constexpr int64_t steps = C * LANES / PACK_FACTOR;
    for (int64_t d = 0; d < pitch;) {
      const int64_t left = (pitch - d) / LANES;
      if (left == 4 || left >= 7) {
        d += add_columns<4, steps>(total, pitch, factors, query_rows, begin, end, d);
      } else if (left == 3 || left >= 5) {
        d += add_columns<3, steps>(total, pitch, factors, query_rows, begin, end, d);
      } else if (left == 2) {
        d += add_columns<2, steps>(total, pitch, factors, query_rows, begin, end, d);
      } else {
        d += add_columns<1, steps>(total, pitch, factors, query_rows, begin, end, d);
      }
    }
  }

  template <int C, int64_t STEPS>
  int64_t add_columns(float* total, int64_t pitch, const float* factors, const float* query_rows, int64_t begin,
                      int64_t end, int64_t d) {
    constexpr int R = NUM_ACCUMULATORS / C < 12 ? NUM_ACCUMULATORS / C : 12;
    for (int64_t j = begin; j < end; j += R) {
      vec sums[R][C];
      float* to = total + j * pitch + d;
      fill(sums, vec{});
      multiply<Dot>(sums, factors + j * ALONG, ALONG, 1, query_rows + d, pitch, STEPS);
      RINGATTN_UNROLL
      for (int r = 0; r < R; ++r) {
        RINGATTN_UNROLL
        for (int c = 0; c < C; ++c) store(to + r * pitch + c * LANES, load(to + r * pitch + c * LANES) + sums[r][c]);
      }
    }
    return C * LANES;
  }
};

}  // namespace ringattn::RINGATTN_ISA
