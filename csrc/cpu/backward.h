// Backward: scores are computed anew, weighed by the final lse, and each block's products go to dq, dk and dv.
//
// Blocks of queries stay in cache while chunks of keys go by, as in the forward: dq is written once per task, dk and
// dv once per chunk and task. Everything that is summed over queries has keys as rows and dims as lanes.
#pragma once
#include "microkernel.h"

namespace ringattn::RINGATTN_ISA {

template <class Arithmetic>
struct Backward {
  static constexpr int64_t CHUNK = 96;          // keys
  static constexpr int64_t PREFETCH_ROWS = 24;  // of them, while a block computes
  static constexpr int PER_WORD = Arithmetic::PER_WORD;
  static constexpr int64_t ALONG = BLOCK / PER_WORD;  // words of a row of weights

  struct Sizes {
    int64_t k_words, v_words;
    int64_t k_pitch, v_pitch;        // rows of k and v, in words; whole vectors
    int64_t dim_pitch, v_dim_pitch;  // rows of fp32, or of stacked rows; whole vectors and whole tiles
    int64_t blocks;
    explicit Sizes(const Problem& p)
        : k_words((p.dim + PER_WORD - 1) / PER_WORD),
          v_words((p.v_dim + PER_WORD - 1) / PER_WORD),
          k_pitch(round_up(k_words, W)),
          v_pitch(round_up(v_words, W)),
          dim_pitch(round_up(round_up(p.dim, W), TILE)),
          v_dim_pitch(round_up(round_up(p.v_dim, W), TILE)),
          blocks(max(1, min(8, (640 << 10) / (4 * block_floats())))) {}
    int64_t block_floats() const {
      return BLOCK * (k_words + v_words + dim_pitch + 2) + BLOCK / PER_WORD * (dim_pitch + v_dim_pitch);
    }
  };

  struct Block {
    int64_t head, row, stop;
    float *q, *dout;            // lanes are queries: (words, BLOCK)
    float *q_rows, *dout_rows;  // lanes are dims: (BLOCK / PER_WORD, pitch)
    float* dq;                  // (dim_pitch, BLOCK)
    float *lse, *delta;         // (BLOCK), lse in powers of two

    // The same without the first vectors of queries.
    Block from(int64_t vector, const Sizes& s) const {
      const int64_t lane = vector * W, word = lane / PER_WORD;
      Block b = *this;
      b.row += lane, b.q += lane, b.dout += lane, b.dq += lane, b.lse += lane, b.delta += lane;
      b.q_rows += word * s.dim_pitch, b.dout_rows += word * s.v_dim_pitch;
      return b;
    }
  };

  static int64_t scratch(const Problem& p) {
    const Sizes s(p);
    const int64_t floats = s.blocks * s.block_floats() + CHUNK * (s.k_pitch + s.v_pitch + s.dim_pitch) +
                           (CHUNK + MAX_TILE_ROWS) * (s.dim_pitch + s.v_dim_pitch + 3 * BLOCK) + TILE * BLOCK +
                           BLOCK * max(s.k_pitch, s.v_pitch);
    return 4 * floats + 64 * (16 + 8 * s.blocks) + s.blocks * (int64_t)sizeof(Block);
  }

  const Problem& p;
  const BackwardTask& task;
  const Sizes s;
  float *k, *v, *k_stacked, *dk, *dv, *weights, *weights_along, *ds_along, *ds_across, *slopes, *rows;
  Block* blocks;

  Backward(const Problem& problem, const BackwardTask& t, void* memory) : p(problem), task(t), s(problem) {
    Arena arena{static_cast<char*>(memory)};
    constexpr bool wide = PER_WORD == 1;
    k = arena.take(CHUNK * s.k_pitch);
    v = arena.take(CHUNK * s.v_pitch);
    k_stacked = wide ? k : arena.take(CHUNK / 2 * s.dim_pitch);
    dk = arena.take((CHUNK + MAX_TILE_ROWS) * s.dim_pitch);
    dv = arena.take((CHUNK + MAX_TILE_ROWS) * s.v_dim_pitch);
    weights = arena.take((CHUNK + MAX_TILE_ROWS) * BLOCK);
    ds_along = arena.take((CHUNK + MAX_TILE_ROWS) * BLOCK);
    weights_along = wide ? weights : arena.take((CHUNK + MAX_TILE_ROWS) * ALONG);
    ds_across = wide ? ds_along : arena.take(CHUNK / 2 * BLOCK);
    slopes = arena.take(TILE * BLOCK);
    rows = arena.take(BLOCK * max(s.k_pitch, s.v_pitch));
    blocks = reinterpret_cast<Block*>(arena.take(s.blocks * sizeof(Block) / 4 + 1));
    for (int64_t i = 0; i < s.blocks; ++i) {
      Block& b = blocks[i];
      b.q = arena.take(s.k_words * BLOCK);
      b.dout = arena.take(s.v_words * BLOCK);
      b.q_rows = arena.take(ALONG * s.dim_pitch);
      b.dout_rows = arena.take(ALONG * s.v_dim_pitch);
      b.dq = arena.take(s.dim_pitch * BLOCK);
      b.lse = arena.take(BLOCK);
      b.delta = arena.take(BLOCK);
    }
  }

  void run() {
    for (int64_t i = 0; i < task.num_segments; ++i) {
      const Segment& segment = task.segments[i];
      const int64_t num_blocks = (segment.q_stop - segment.q_start + BLOCK - 1) / BLOCK * p.group();
      for (int64_t first = 0; first < num_blocks; first += s.blocks) {
        run(segment, first, min(s.blocks, num_blocks - first));
      }
    }
  }

  void run(const Segment& segment, int64_t first_block, int64_t count) {
    const int64_t row = segment.q_start + first_block / p.group() * BLOCK;
    const int64_t stop = min(segment.q_start + ((first_block + count - 1) / p.group() + 1) * BLOCK, segment.q_stop);
    bool begun = false;
    for (int64_t i = 0; i < segment.num_tiles; ++i) {
      const Tile& tile = *segment.tiles[i];
      const int64_t first = max(max(tile.k_start, row + tile.lo), task.k_start);
      const int64_t last = min(min(tile.k_stop, stop + tile.hi), task.k_stop);
      for (int64_t start = first; start < last; start += CHUNK) {
        if (!begun) {
          for (int64_t b = 0; b < count; ++b) begin(blocks[b], segment, first_block + b);
          begun = true;
        }
        const int64_t n = min(CHUNK, last - start);
        begin_chunk(start, n);
        // While blocks compute with this chunk, its sums and the next one are asked of memory, a few rows for each.
        int64_t asked = start;
        for (int64_t b = 0; b < count; ++b) {
          const Band band{blocks[b].row, blocks[b].stop, start, n, tile};
          if (band.begin() >= band.end()) continue;
          for (const int64_t until = min(asked + PREFETCH_ROWS, start + n); asked < until; ++asked) {
            ask(asked, asked + CHUNK < last);
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
    prefetch(p.dk, Dtype::float32, task.batch, key, task.kv_head, p.dim);
    prefetch(p.dv, Dtype::float32, task.batch, key, task.kv_head, p.v_dim);
    if (!more) return;
    prefetch(p.k, p.dtype, task.batch, key + CHUNK, task.kv_head, p.dim);
    prefetch(p.v, p.dtype, task.batch, key + CHUNK, task.kv_head, p.v_dim);
  }

  void begin(Block& b, const Segment& segment, int64_t index) {
    b.row = segment.q_start + index / p.group() * BLOCK;
    b.stop = min(b.row + BLOCK, segment.q_stop);
    b.head = task.kv_head * p.group() + index % p.group();
    const int64_t n = b.stop - b.row;
    load_queries(p.q, b, p.dim, s.k_words, s.k_pitch, b.q, s.dim_pitch, b.q_rows);
    load_queries(p.dout, b, p.v_dim, s.v_words, s.v_pitch, b.dout, s.v_dim_pitch, b.dout_rows);
    for (int64_t i = 0; i < BLOCK; ++i) {
      const float lse = i < n ? of_query(p.lse, b, i) : 0.0f;
      // A query without any key has no weights.
      b.lse[i] = lse == -INFINITE ? INFINITE : lse * LOG2_E;
      b.delta[i] = i < n ? of_query(p.delta, b, i) : 0.0f;
    }
    for (int64_t i = 0; i < s.dim_pitch * BLOCK; i += W) store(b.dq + i, vec{});
  }

  void load_queries(const Input& x, const Block& b, int64_t dim, int64_t words, int64_t pitch, float* lanes,
                    int64_t stacked_pitch, float* stacked) {
    const int64_t n = b.stop - b.row;
    Arithmetic::stack_rows(stacked, stacked_pitch, {x, p.dtype, task.batch, b.head, b.row, n, BLOCK, dim});
    if (PER_WORD == 1) {
      rows_to_lanes(lanes, stacked, stacked_pitch, n, words);
    } else {
      Arithmetic::copy_rows(rows, pitch, {x, p.dtype, task.batch, b.head, b.row, n, n, dim});
      rows_to_lanes(lanes, rows, pitch, n, words);
    }
  }

  void end(const Block& b) {
    float* dq = task.dq.data + task.batch * task.dq.batch + b.row * task.dq.row + b.head * task.dq.head;
    lanes_to_rows(b.dq, b.stop - b.row, p.dim, [&](int64_t i, int64_t d, vec values, int64_t count) {
      float* to = dq + i * task.dq.row + d;
      store(to, load(to, count) + values * p.scale, count);
    });
  }

  void begin_chunk(int64_t start, int64_t n) {
    const int64_t n_pad = round_up(n, TILE);
    Arithmetic::copy_rows(k, s.k_pitch, {p.k, p.dtype, task.batch, task.kv_head, start, n, n_pad, p.dim});
    Arithmetic::copy_rows(v, s.v_pitch, {p.v, p.dtype, task.batch, task.kv_head, start, n, n_pad, p.v_dim});
    if (PER_WORD == 2) {
      Arithmetic::stack_rows(k_stacked, s.dim_pitch, {p.k, p.dtype, task.batch, task.kv_head, start, n, n_pad, p.dim});
    }
    for (int64_t i = 0; i < n * s.dim_pitch; i += W) store(dk + i, vec{});
    for (int64_t i = 0; i < n * s.v_dim_pitch; i += W) store(dv + i, vec{});
  }

  void end_chunk(int64_t start, int64_t n) {
    add(p.dk, start, n, dk, s.dim_pitch, p.dim, p.scale);
    add(p.dv, start, n, dv, s.v_dim_pitch, p.v_dim, 1.0f);
  }

  void add(const State& total, int64_t start, int64_t n, const float* part, int64_t pitch, int64_t dim, float scale) {
    float* to = total.data + task.batch * total.batch + start * total.row + task.kv_head * total.head;
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t e = 0; e < dim; ++e) to[j * total.row + e] += part[j * pitch + e] * scale;
    }
  }

  void attend(Block& b, const Band& band) {
    for_each_visible_run(band, [&](auto count, int64_t vector, int64_t begin, int64_t end) {
      Block part = b.from(vector, s);
      attend<count.value>(part, band.part(vector, count.value), begin, end);
    });
  }

  template <int C>
  void attend(Block& b, const Band& band, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j += TILE) differentiate<C>(b, band, j);
    // The tiles of the sums over queries may reach beyond the last key.
    for (int64_t i = end * ALONG; i < (begin + round_up(end - begin, MAX_TILE_ROWS)) * ALONG; ++i) {
      weights_along[i] = ds_along[i] = 0;
    }
    sum_over_queries<C>(dv, s.v_dim_pitch, weights_along, b.dout_rows, begin, end);
    sum_over_queries<C>(dk, s.dim_pitch, ds_along, b.q_rows, begin, end);
    for (int64_t d = 0; d < p.dim; d += TILE) {
      vec sums[TILE][C];
      fill(sums, vec{});
      multiply<Arithmetic>(sums, k_stacked + begin / PER_WORD * stacked_pitch() + d, 1, stacked_pitch(),
                           ds_across + begin / PER_WORD * BLOCK, BLOCK, (end - begin) / PER_WORD);
      RINGATTN_UNROLL
      for (int r = 0; r < TILE; ++r) {
        RINGATTN_UNROLL
        for (int c = 0; c < C; ++c) {
          float* dq = b.dq + (d + r) * BLOCK + c * W;
          store(dq, load(dq) + sums[r][c]);
        }
      }
    }
  }

  float of_query(const Statistic& x, const Block& b, int64_t i) const {
    return x.data[task.batch * x.batch + (b.row + i) * x.row + b.head * x.head];
  }
  int64_t stacked_pitch() const { return PER_WORD == 1 ? s.k_pitch : s.dim_pitch; }

  // Weights and gradients of scores for TILE keys: p = 2 ** (score - lse), ds = p * (dout . v - delta).
  template <int C>
  void differentiate(const Block& b, const Band& band, int64_t j) {
    vec sums[TILE][C];
    fill(sums, vec{});
    multiply<Arithmetic>(sums, k + j * s.k_pitch, s.k_pitch, 1, b.q, BLOCK, s.k_words);
    const bool capped = p.softcap != 0.0f, masked = !band.whole(j, TILE);
    if (__builtin_expect(capped, 0)) cap(sums);
    const vec factor = broadcast(capped ? 1.0f : p.scale * LOG2_E);
    RINGATTN_UNROLL
    for (int c = 0; c < C; ++c) {
      const vec lse = load(b.lse + c * W);
      RINGATTN_UNROLL
      for (int r = 0; r < TILE; ++r) sums[r][c] = exp2(at_most_zero(fma(sums[r][c], factor, -lse)));
    }
    if (__builtin_expect(masked, 0)) mask(sums, band, j);
    RINGATTN_UNROLL
    for (int r = 0; r < TILE; ++r) {
      RINGATTN_UNROLL
      for (int c = 0; c < C; ++c) store(weights + (j + r) * BLOCK + c * W, sums[r][c]);
    }
    RINGATTN_UNROLL
    for (int c = 0; c < C; ++c) {
      const vec delta = load(b.delta + c * W);
      RINGATTN_UNROLL
      for (int r = 0; r < TILE; ++r) sums[r][c] = -delta;
    }
    multiply<Arithmetic>(sums, v + j * s.v_pitch, s.v_pitch, 1, b.dout, BLOCK, s.v_words);
    RINGATTN_UNROLL
    for (int r = 0; r < TILE; ++r) {
      RINGATTN_UNROLL
      for (int c = 0; c < C; ++c) sums[r][c] *= load(weights + (j + r) * BLOCK + c * W);
    }
    if (__builtin_expect(capped, 0)) {
      for (int r = 0; r < TILE; ++r) {
        for (int c = 0; c < C; ++c) sums[r][c] *= load(slopes + r * BLOCK + c * W);
      }
    }
    if (__builtin_expect(masked, 0)) mask(sums, band, j);  // 0 x NaN, of a key that others may see
    RINGATTN_UNROLL
    for (int r = 0; r < TILE; r += 2) {
      RINGATTN_UNROLL
      for (int c = 0; c < C; ++c) put(j + r, c, sums[r][c], sums[r + 1][c]);
    }
  }

  void put(int64_t j, int c, vec even, vec odd) {
    constexpr int along = W / PER_WORD;
    Arithmetic::put_along(ds_along + j * ALONG + c * along, ALONG, even, odd);
    if constexpr (PER_WORD == 2) {
      Arithmetic::put_across(ds_across + j / 2 * BLOCK + c * W, BLOCK, even, odd);
      const vec a = load(weights + j * BLOCK + c * W), z = load(weights + (j + 1) * BLOCK + c * W);
      Arithmetic::put_along(weights_along + j * ALONG + c * along, ALONG, a, z);
    }
  }

  template <int C>
  __attribute__((noinline)) void cap(vec (&sums)[TILE][C]) {
    const float inner = p.scale / p.softcap, outer = p.softcap * LOG2_E;
    for (int r = 0; r < TILE; ++r) {
      for (int c = 0; c < C; ++c) {
        const vec squashed = tanh(sums[r][c] * inner);
        store(slopes + r * BLOCK + c * W, 1.0f - squashed * squashed);
        sums[r][c] = squashed * outer;
      }
    }
  }

  template <int C>
  __attribute__((noinline)) void mask(vec (&sums)[TILE][C], const Band& band, int64_t j) {
    for (int r = 0; r < TILE; ++r) {
      const LaneRange lanes = band.lanes(j + r);
      for (int c = 0; c < C; ++c) sums[r][c] = select(LaneRange::mask(lanes, c), sums[r][c], vec{});
    }
  }

  // total[j] += sum over queries of weights[j][query] * rows[query], for keys begin to end.
  template <int C>
  void sum_over_queries(float* total, int64_t pitch, const float* factors, const float* query_rows, int64_t begin,
                        int64_t end) {
    constexpr int64_t steps = C * W / PER_WORD;
    for (int64_t d = 0; d < pitch;) {
      const int64_t left = (pitch - d) / W;
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
    constexpr int R = ACCUMULATORS / C < 12 ? ACCUMULATORS / C : 12;
    for (int64_t j = begin; j < end; j += R) {
      vec sums[R][C];
      float* to = total + j * pitch + d;
      fill(sums, vec{});
      multiply<Arithmetic>(sums, factors + j * ALONG, ALONG, 1, query_rows + d, pitch, STEPS);
      RINGATTN_UNROLL
      for (int r = 0; r < R; ++r) {
        RINGATTN_UNROLL
        for (int c = 0; c < C; ++c) store(to + r * pitch + c * W, load(to + r * pitch + c * W) + sums[r][c]);
      }
    }
    return C * W;
  }
};

}  // namespace ringattn::RINGATTN_ISA
