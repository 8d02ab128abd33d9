// The backward kernel: scores are recomputed, turned into probabilities with the final lse, and accumulated into dq, dk
// and dv.
//
// As in the forward, query blocks stay in cache while a loop passes over key blocks. dq is added to memory once per
// task and query block, dk and dv once per task and key block. Sums over keys (dq) have queries as lanes; sums over
// queries (dk, dv) have dims as lanes.
#pragma once
#include "arena.h"
#include "band_mask.h"

namespace ringattn::RINGATTN_ISA {

template <class Dot>
struct BackwardKernel {
  static constexpr int64_t BLOCK_N = 96;        // keys of a key block
  static constexpr int64_t PREFETCH_ROWS = 24;  // rows of dk and dv, and of the next key block, per query block
  static constexpr int PACK_FACTOR = Dot::PACK_FACTOR;
  static constexpr int64_t BLOCK_M_WORDS = BLOCK_M / PACK_FACTOR;  // words of a row of BLOCK_M probabilities
  static constexpr int64_t PADDED_N = BLOCK_N + MAX_TILE_ROWS;     // register tiles may reach beyond the last key

  struct BufferDims {
    int64_t k_words, v_words;        // of a row of q or k, and of a row of dout or v
    int64_t k_pitch, v_pitch;        // words from row to row of k and v, row-major: whole vectors
    int64_t dim_pitch, v_dim_pitch;  // words from row to row of fp32 or VNNI matrices: whole vectors and register tiles
    int64_t blocks;                  // query blocks that are processed together
    explicit BufferDims(const AttentionParams& p)
        : k_words((p.dim + PACK_FACTOR - 1) / PACK_FACTOR),
          v_words((p.v_dim + PACK_FACTOR - 1) / PACK_FACTOR),
          k_pitch(round_up(k_words, LANES)),
          v_pitch(round_up(v_words, LANES)),
          dim_pitch(round_up(round_up(p.dim, LANES), TILE_ROWS)),
          v_dim_pitch(round_up(round_up(p.v_dim, LANES), TILE_ROWS)),
          blocks(max(1, min(8, (640 << 10) / (4 * block_floats())))) {}
    int64_t block_floats() const {
      return BLOCK_M * (k_words + v_words + dim_pitch + 2) + BLOCK_M_WORDS * (dim_pitch + v_dim_pitch);
    }
  };

  struct QueryBlock {
    int64_t head, row, stop;
    float *q, *dout;            // (words, BLOCK_M)
    float *q_vnni, *dout_vnni;  // (BLOCK_M_WORDS, dim_pitch), (BLOCK_M_WORDS, v_dim_pitch): rows in the VNNI layout
    float* dq;                  // (dim_pitch, BLOCK_M)
    float *lse_log2, *delta;    // (BLOCK_M); lse_log2 is lse as a base 2 logarithm

    // The same block without its first vectors.
    QueryBlock from(int64_t vector, const BufferDims& dims) const {
      const int64_t lane = vector * LANES, word = lane / PACK_FACTOR;
      QueryBlock b = *this;
      b.row += lane, b.q += lane, b.dout += lane, b.dq += lane, b.lse_log2 += lane, b.delta += lane;
      b.q_vnni += word * dims.dim_pitch, b.dout_vnni += word * dims.v_dim_pitch;
      return b;
    }
  };

  struct Buffers {
    // A key block. In fp32 both layouts are the same and share memory, also for probs and ds.
    float *k, *v, *k_vnni;  // (BLOCK_N, k_pitch), (BLOCK_N, v_pitch); (BLOCK_N / PACK_FACTOR, dim_pitch)
    float *dk, *dv;         // (PADDED_N, dim_pitch), (PADDED_N, v_dim_pitch): sums over queries, dk without the scale
    // Probabilities of the key block, and the gradients of its scores.
    float *probs, *probs_rows;  // (PADDED_N, BLOCK_M) in fp32; (PADDED_N, BLOCK_M_WORDS)
    float *ds, *ds_vnni;        // (PADDED_N, BLOCK_M_WORDS); (BLOCK_N / PACK_FACTOR, BLOCK_M)
    float* softcap_grad;        // (TILE_ROWS, BLOCK_M): the derivative of the softcap
    float* rows;                // (BLOCK_M, k_pitch or v_pitch): q or dout before the transpose
    QueryBlock* blocks;

    Buffers(Arena& arena, const BufferDims& dims) {
      constexpr bool packed = PACK_FACTOR > 1;
      k = arena.take(BLOCK_N * dims.k_pitch);
      v = arena.take(BLOCK_N * dims.v_pitch);
      k_vnni = packed ? arena.take(BLOCK_N / PACK_FACTOR * dims.dim_pitch) : k;
      dk = arena.take(PADDED_N * dims.dim_pitch);
      dv = arena.take(PADDED_N * dims.v_dim_pitch);
      probs = arena.take(PADDED_N * BLOCK_M);
      ds = arena.take(PADDED_N * BLOCK_M_WORDS);
      probs_rows = packed ? arena.take(PADDED_N * BLOCK_M_WORDS) : probs;
      ds_vnni = packed ? arena.take(BLOCK_N / PACK_FACTOR * BLOCK_M) : ds;
      softcap_grad = arena.take(TILE_ROWS * BLOCK_M);
      rows = arena.take(BLOCK_M * max(dims.k_pitch, dims.v_pitch));
      blocks = arena.take<QueryBlock>(dims.blocks);
      for (int64_t i = 0; i < dims.blocks; ++i) {
        const QueryBlock b = take_block(arena, dims);
        if (blocks) blocks[i] = b;
      }
    }

    static QueryBlock take_block(Arena& arena, const BufferDims& dims) {
      QueryBlock b{};
      b.q = arena.take(dims.k_words * BLOCK_M);
      b.dout = arena.take(dims.v_words * BLOCK_M);
      b.q_vnni = arena.take(BLOCK_M_WORDS * dims.dim_pitch);
      b.dout_vnni = arena.take(BLOCK_M_WORDS * dims.v_dim_pitch);
      b.dq = arena.take(dims.dim_pitch * BLOCK_M);
      b.lse_log2 = arena.take(BLOCK_M);
      b.delta = arena.take(BLOCK_M);
      return b;
    }
  };

  static int64_t scratch(const AttentionParams& p) { return scratch_bytes<Buffers>(BufferDims(p)); }

  const AttentionParams& p;
  const BackwardTask& task;
  const BufferDims dims;
  const Buffers buf;

  BackwardKernel(const AttentionParams& params, const BackwardTask& t, void* memory)
      : p(params), task(t), dims(params), buf(allocate<Buffers>(memory, dims)) {}

  void run() {
    for (int64_t i = 0; i < task.num_segments; ++i) {
      const QuerySegment& segment = task.segments[i];
      const int64_t num_blocks = (segment.q_stop - segment.q_start + BLOCK_M - 1) / BLOCK_M * p.group();
      for (int64_t first = 0; first < num_blocks; first += dims.blocks) {
        process_query_blocks(segment, first, min(dims.blocks, num_blocks - first));
      }
    }
  }

  // Query blocks [first_block, first_block + count) of a segment against the task's keys.
  void process_query_blocks(const QuerySegment& segment, int64_t first_block, int64_t count) {
    const int64_t row = segment.q_start + first_block / p.group() * BLOCK_M;
    const int64_t stop = min(segment.q_start + ((first_block + count - 1) / p.group() + 1) * BLOCK_M, segment.q_stop);
    bool loaded = false;
    for (int64_t i = 0; i < segment.num_tiles; ++i) {
      const Tile& tile = *segment.tiles[i];
      const int64_t first = max(max(tile.k_start, row + tile.lo), task.k_start);
      const int64_t last = min(min(tile.k_stop, stop + tile.hi), task.k_stop);
      for (int64_t start = first; start < last; start += BLOCK_N) {
        for (int64_t b = 0; !loaded && b < count; ++b) load_block(buf.blocks[b], segment, first_block + b);
        loaded = true;
        process_key_block(tile, start, last, count);
      }
    }
    for (int64_t b = 0; loaded && b < count; ++b) store_block(buf.blocks[b]);
  }

  // Keys from `start` on, at most BLOCK_N and none from `last` on, against the first `count` query blocks.
  void process_key_block(const Tile& tile, int64_t start, int64_t last, int64_t count) {
    const int64_t n = min(BLOCK_N, last - start);
    load_key_block(start, n);
    int64_t prefetched = start;
    for (int64_t i = 0; i < count; ++i) {
      QueryBlock& block = buf.blocks[i];
      const BandMask mask{block.row, block.stop, start, n, tile};
      if (mask.begin() >= mask.end()) continue;
      // Each query block prefetches a few rows, which arrive during its computation.
      for (const int64_t until = min(prefetched + PREFETCH_ROWS, start + n); prefetched < until; ++prefetched) {
        prefetch_key(prefetched, prefetched + BLOCK_N < last);
      }
      for_each_visible_run(mask, [&](auto num_vectors, int64_t vector, int64_t begin, int64_t end) {
        QueryBlock vectors = block.from(vector, dims);
        accumulate<num_vectors.value>(vectors, mask.vectors(vector, num_vectors.value), begin, end);
      });
    }
    add_to_rows(p.dk, start, n, buf.dk, dims.dim_pitch, p.dim, p.scale);
    add_to_rows(p.dv, start, n, buf.dv, dims.v_dim_pitch, p.v_dim, 1.0f);
  }

  // Prefetches a key's rows of dk and dv, and, if there is a next key block, the rows of k and v a key block later.
  void prefetch_key(int64_t key, bool has_next) const {
    prefetch_row(p.dk, Dtype::float32, task.batch, key, task.kv_head, p.dim);
    prefetch_row(p.dv, Dtype::float32, task.batch, key, task.kv_head, p.v_dim);
    if (!has_next) return;
    prefetch_row(p.k, p.dtype, task.batch, key + BLOCK_N, task.kv_head, p.dim);
    prefetch_row(p.v, p.dtype, task.batch, key + BLOCK_N, task.kv_head, p.v_dim);
  }

  void load_block(QueryBlock& b, const QuerySegment& segment, int64_t index) {
    b.row = segment.q_start + index / p.group() * BLOCK_M;
    b.stop = min(b.row + BLOCK_M, segment.q_stop);
    b.head = task.kv_head * p.group() + index % p.group();
    const int64_t n = b.stop - b.row;
    load_query_rows(p.q, b, p.dim, dims.k_words, dims.k_pitch, b.q, dims.dim_pitch, b.q_vnni);
    load_query_rows(p.dout, b, p.v_dim, dims.v_words, dims.v_pitch, b.dout, dims.v_dim_pitch, b.dout_vnni);
    for (int64_t i = 0; i < BLOCK_M; ++i) {
      const float lse = i < n ? row_stat(p.lse, b, i) : 0.0f;
      // The probabilities of a query that saw no key are 2^-inf.
      b.lse_log2[i] = lse == -INF ? INF : lse * LOG2_E;
      b.delta[i] = i < n ? row_stat(p.delta, b, i) : 0.0f;
    }
    for (int64_t i = 0; i < dims.dim_pitch * BLOCK_M; i += LANES) store(b.dq + i, vec{});
  }

  // Loads a query block's rows of x into `vnni`, and transposed into `lanes`.
  void load_query_rows(const InputView& x, const QueryBlock& b, int64_t dim, int64_t words, int64_t pitch, float* lanes,
                       int64_t vnni_pitch, float* vnni) {
    const int64_t n = b.stop - b.row;
    Dot::copy_rows_vnni(vnni, vnni_pitch, {x, p.dtype, task.batch, b.head, b.row, n, BLOCK_M, dim});
    if (PACK_FACTOR == 1) {
      transpose_to_lanes(lanes, vnni, vnni_pitch, n, words);
    } else {
      Dot::copy_rows(buf.rows, pitch, {x, p.dtype, task.batch, b.head, b.row, n, n, dim});
      transpose_to_lanes(lanes, buf.rows, pitch, n, words);
    }
  }

  // Adds a block's dq to memory.
  void store_block(const QueryBlock& b) {
    float* dq = task.dq.data + task.batch * task.dq.batch + b.row * task.dq.row + b.head * task.dq.head;
    transpose_from_lanes(b.dq, b.stop - b.row, p.dim, [&](int64_t i, int64_t d, vec values, int64_t count) {
      float* to = dq + i * task.dq.row + d;
      store(to, load(to, count) + values * p.scale, count);
    });
  }

  void load_key_block(int64_t start, int64_t n) {
    const int64_t n_pad = round_up(n, TILE_ROWS);
    const RowRange k{p.k, p.dtype, task.batch, task.kv_head, start, n, n_pad, p.dim};
    Dot::copy_rows(buf.k, dims.k_pitch, k);
    Dot::copy_rows(buf.v, dims.v_pitch, {p.v, p.dtype, task.batch, task.kv_head, start, n, n_pad, p.v_dim});
    if (PACK_FACTOR == 2) Dot::copy_rows_vnni(buf.k_vnni, dims.dim_pitch, k);
    for (int64_t i = 0; i < n * dims.dim_pitch; i += LANES) store(buf.dk + i, vec{});
    for (int64_t i = 0; i < n * dims.v_dim_pitch; i += LANES) store(buf.dv + i, vec{});
  }

  // total[start + j] += part[j] * scale for n keys.
  void add_to_rows(const AccumulatorView& total, int64_t start, int64_t n, const float* part, int64_t pitch,
                   int64_t dim, float scale) {
    float* to = total.data + task.batch * total.batch + start * total.row + task.kv_head * total.head;
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t e = 0; e < dim; ++e) to[j * total.row + e] += part[j * pitch + e] * scale;
    }
  }

  // The gradients of C vectors of queries and keys [begin, end) of the key block.
  template <int C>
  void accumulate(QueryBlock& b, const BandMask& mask, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j += TILE_ROWS) compute_ds<C>(b, mask, j);
    // Register tiles of sums over queries may reach beyond the last key.
    for (int64_t i = end * BLOCK_M_WORDS; i < (begin + round_up(end - begin, MAX_TILE_ROWS)) * BLOCK_M_WORDS; ++i) {
      buf.probs_rows[i] = buf.ds[i] = 0;
    }
    sum_over_queries<C>(buf.dv, dims.v_dim_pitch, buf.probs_rows, b.dout_vnni, begin, end);
    sum_over_queries<C>(buf.dk, dims.dim_pitch, buf.ds, b.q_vnni, begin, end);
    const int64_t k_pitch = PACK_FACTOR == 1 ? dims.k_pitch : dims.dim_pitch;
    for (int64_t d = 0; d < p.dim; d += TILE_ROWS) {
      vec acc[TILE_ROWS][C];
      fill(acc, vec{});
      multiply_accumulate<Dot>(acc, buf.k_vnni + begin / PACK_FACTOR * k_pitch + d, 1, k_pitch,
                               buf.ds_vnni + begin / PACK_FACTOR * BLOCK_M, BLOCK_M, (end - begin) / PACK_FACTOR);
      RINGATTN_UNROLL
      for (int r = 0; r < TILE_ROWS; ++r) {
        RINGATTN_UNROLL
        for (int c = 0; c < C; ++c) {
          float* dq = b.dq + (d + r) * BLOCK_M + c * LANES;
          store(dq, load(dq) + acc[r][c]);
        }
      }
    }
  }

  float row_stat(const RowStatView& x, const QueryBlock& b, int64_t i) const {
    return x.data[task.batch * x.batch + (b.row + i) * x.row + b.head * x.head];
  }

  // For TILE_ROWS keys: probabilities exp(score - lse), and ds = probability * (dout . v - delta).
  template <int C>
  void compute_ds(const QueryBlock& b, const BandMask& mask, int64_t j) {
    const bool masked = !mask.all_visible(j, TILE_ROWS);
    vec acc[TILE_ROWS][C];
    compute_probs(acc, b, mask, j, masked);
    RINGATTN_UNROLL
    for (int c = 0; c < C; ++c) {
      const vec delta = load(b.delta + c * LANES);
      RINGATTN_UNROLL
      for (int r = 0; r < TILE_ROWS; ++r) acc[r][c] = -delta;
    }
    multiply_accumulate<Dot>(acc, buf.v + j * dims.v_pitch, dims.v_pitch, 1, b.dout, BLOCK_M, dims.v_words);
    RINGATTN_UNROLL
    for (int r = 0; r < TILE_ROWS; ++r) {
      RINGATTN_UNROLL
      for (int c = 0; c < C; ++c) acc[r][c] *= load(buf.probs + (j + r) * BLOCK_M + c * LANES);
    }
    if (__builtin_expect(p.softcap != 0.0f, 0)) {
      for (int r = 0; r < TILE_ROWS; ++r) {
        for (int c = 0; c < C; ++c) acc[r][c] *= load(buf.softcap_grad + r * BLOCK_M + c * LANES);
      }
    }
    // A masked probability is 0, but 0 * NaN is NaN: the key may have a NaN that only other queries see.
    if (__builtin_expect(masked, 0)) apply_mask(acc, mask, j);
    RINGATTN_UNROLL
    for (int r = 0; r < TILE_ROWS; r += 2) {
      RINGATTN_UNROLL
      for (int c = 0; c < C; ++c) store_ds(j + r, c, acc[r][c], acc[r + 1][c]);
    }
  }

  // Writes the probabilities of TILE_ROWS keys to buf.probs; `acc` is the register tile to compute them in.
  template <int C>
  __attribute__((always_inline)) void compute_probs(vec (&acc)[TILE_ROWS][C], const QueryBlock& b, const BandMask& mask,
                                                    int64_t j, bool masked) {
    fill(acc, vec{});
    multiply_accumulate<Dot>(acc, buf.k + j * dims.k_pitch, dims.k_pitch, 1, b.q, BLOCK_M, dims.k_words);
    const bool capped = p.softcap != 0.0f;
    if (__builtin_expect(capped, 0)) apply_softcap(acc);
    const vec scale_log2 = broadcast(capped ? 1.0f : p.scale * LOG2_E);
    RINGATTN_UNROLL
    for (int c = 0; c < C; ++c) {
      const vec lse = load(b.lse_log2 + c * LANES);
      RINGATTN_UNROLL
      for (int r = 0; r < TILE_ROWS; ++r) acc[r][c] = exp2(min_zero(fma(acc[r][c], scale_log2, -lse)));
    }
    if (__builtin_expect(masked, 0)) apply_mask(acc, mask, j);
    RINGATTN_UNROLL
    for (int r = 0; r < TILE_ROWS; ++r) {
      RINGATTN_UNROLL
      for (int c = 0; c < C; ++c) store(buf.probs + (j + r) * BLOCK_M + c * LANES, acc[r][c]);
    }
  }

  // Stores ds of keys j and j + 1 for vector c of the queries. With bf16, also packs the probabilities.
  void store_ds(int64_t j, int c, vec even, vec odd) {
    constexpr int vector_words = LANES / PACK_FACTOR;
    Dot::store_rows(buf.ds + j * BLOCK_M_WORDS + c * vector_words, BLOCK_M_WORDS, even, odd);
    if constexpr (PACK_FACTOR == 2) {
      Dot::store_rows_vnni(buf.ds_vnni + j / 2 * BLOCK_M + c * LANES, BLOCK_M, even, odd);
      const float* probs = buf.probs + j * BLOCK_M + c * LANES;
      Dot::store_rows(buf.probs_rows + j * BLOCK_M_WORDS + c * vector_words, BLOCK_M_WORDS, load(probs),
                      load(probs + BLOCK_M));
    }
  }

  // Turns products into capped scores, as base 2 logarithms, and keeps the derivative of the softcap.
  template <int C>
  __attribute__((noinline)) void apply_softcap(vec (&scores)[TILE_ROWS][C]) {
    const float inner = p.scale / p.softcap, outer = p.softcap * LOG2_E;
    for (int r = 0; r < TILE_ROWS; ++r) {
      for (int c = 0; c < C; ++c) {
        const vec t = tanh(scores[r][c] * inner);
        store(buf.softcap_grad + r * BLOCK_M + c * LANES, 1.0f - t * t);
        scores[r][c] = t * outer;
      }
    }
  }

  template <int C>
  __attribute__((noinline)) void apply_mask(vec (&x)[TILE_ROWS][C], const BandMask& mask, int64_t j) {
    for (int r = 0; r < TILE_ROWS; ++r) {
      const LaneRange lanes = mask.visible_lanes(j + r);
      for (int c = 0; c < C; ++c) x[r][c] = select(LaneRange::mask(lanes, c), x[r][c], vec{});
    }
  }

  // total[j] += sum over queries of factors[j][query] * query_rows[query], for keys [begin, end).
  template <int C>
  void sum_over_queries(float* total, int64_t pitch, const float* factors, const float* query_rows, int64_t begin,
                        int64_t end) {
    constexpr int64_t steps = C * LANES / PACK_FACTOR;
    for (int64_t d = 0; d < pitch;) {
      const int64_t left = (pitch - d) / LANES;
      if (left == 4 || left >= 7) {
        d += sum_columns<4, steps>(total, pitch, factors, query_rows, begin, end, d);
      } else if (left == 3 || left >= 5) {
        d += sum_columns<3, steps>(total, pitch, factors, query_rows, begin, end, d);
      } else if (left == 2) {
        d += sum_columns<2, steps>(total, pitch, factors, query_rows, begin, end, d);
      } else {
        d += sum_columns<1, steps>(total, pitch, factors, query_rows, begin, end, d);
      }
    }
  }

  // The same for C vectors of dims from d on. Returns the number of these dims.
  template <int C, int64_t STEPS>
  int64_t sum_columns(float* total, int64_t pitch, const float* factors, const float* query_rows, int64_t begin,
                      int64_t end, int64_t d) {
    constexpr int R = NUM_ACCUMULATORS / C < 12 ? NUM_ACCUMULATORS / C : 12;
    for (int64_t j = begin; j < end; j += R) {
      vec acc[R][C];
      float* to = total + j * pitch + d;
      fill(acc, vec{});
      multiply_accumulate<Dot>(acc, factors + j * BLOCK_M_WORDS, BLOCK_M_WORDS, 1, query_rows + d, pitch, STEPS);
      RINGATTN_UNROLL
      for (int r = 0; r < R; ++r) {
        RINGATTN_UNROLL
        for (int c = 0; c < C; ++c) store(to + r * pitch + c * LANES, load(to + r * pitch + c * LANES) + acc[r][c]);
      }
    }
    return C * LANES;
  }
};

}  // namespace ringattn::RINGATTN_ISA
