// The forward kernel: query blocks stay in cache while a loop passes over key blocks and updates the online softmax.
//
// A vector's lanes are queries. So the softmax needs no reduction across lanes, and keys and values keep their layout:
// each of their elements is broadcast. The order of the loops is FlashAttention-2's (Dao 2023, arXiv:2307.08691).
#pragma once
#include "arena.h"
#include "band_mask.h"

namespace ringattn::RINGATTN_ISA {

template <class Dot>
struct ForwardKernel {
  static constexpr int64_t BLOCK_N = 64;        // keys of a key block
  static constexpr int64_t PREFETCH_ROWS = 12;  // rows of the next key block to prefetch per query block
  static constexpr int PACK_FACTOR = Dot::PACK_FACTOR;

  struct BufferDims {
    int64_t words;    // of a row of q and k
    int64_t k_pitch;  // words from row to row of k, and of q before its transpose: whole vectors
    int64_t v_pitch;  // words from row to row of v: whole register tiles
    int64_t blocks;   // query blocks of a task: their q and out fill about half of a second-level cache
    explicit BufferDims(const AttentionParams& p)
        : words((p.dim + PACK_FACTOR - 1) / PACK_FACTOR),
          k_pitch(round_up(words, LANES)),
          v_pitch(round_up(p.v_dim, TILE_ROWS)),
          blocks(max(1, min(16, (512 << 10) / (4 * BLOCK_M * (words + v_pitch))))) {}
  };

  struct QueryBlock {
    int64_t head, row, stop;
    float *q, *out;  // (words, BLOCK_M), (v_pitch, BLOCK_M)
    float *m, *l;    // (BLOCK_M): the running maximum of the scores, and the running sum of exp(score - m)

    // The same block without its first vectors.
    QueryBlock from(int64_t vector) const {
      const int64_t lane = vector * LANES;
      return {head, row + lane, stop, q + lane, out + lane, m + lane, l + lane};
    }
  };

  struct Buffers {
    float *k, *v;   // (BLOCK_N, k_pitch), (BLOCK_N / PACK_FACTOR, v_pitch) in the VNNI layout
    float* scores;  // (BLOCK_N, BLOCK_M); then probabilities, in the VNNI layout
    float* q_rows;  // (BLOCK_M, k_pitch): q before its transpose
    QueryBlock* blocks;

    Buffers(Arena& arena, const BufferDims& dims) {
      k = arena.take(BLOCK_N * dims.k_pitch);
      v = arena.take(BLOCK_N / PACK_FACTOR * dims.v_pitch);
      scores = arena.take(BLOCK_N * BLOCK_M);
      q_rows = arena.take(BLOCK_M * dims.k_pitch);
      blocks = arena.take<QueryBlock>(dims.blocks);
      for (int64_t i = 0; i < dims.blocks; ++i) {
        QueryBlock b{};
        b.q = arena.take(dims.words * BLOCK_M);
        b.out = arena.take(dims.v_pitch * BLOCK_M);
        b.m = arena.take(BLOCK_M);
        b.l = arena.take(BLOCK_M);
        if (blocks) blocks[i] = b;
      }
    }
  };

  static int64_t blocks_per_task(const AttentionParams& p) { return BufferDims(p).blocks; }
  static int64_t scratch(const AttentionParams& p) { return scratch_bytes<Buffers>(BufferDims(p)); }

  const AttentionParams& p;
  const ForwardTask& task;
  const BufferDims dims;
  const Buffers buf;
  const float scale_log2;  // turns stored scores into base 2 logarithms

  ForwardKernel(const AttentionParams& params, const ForwardTask& t, void* memory)
      : p(params), task(t), dims(params), buf(allocate<Buffers>(memory, dims)), scale_log2(stored_scale_log2(params)) {}

  void run() {
    for (int64_t i = 0; i < task.count; ++i) load_block(buf.blocks[i], task.first + i);
    const int64_t row = buf.blocks[0].row, stop = buf.blocks[task.count - 1].stop;
    for (int64_t i = 0; i < task.segment->num_tiles; ++i) {
      const Tile& tile = *task.segment->tiles[i];
      const int64_t first = max(tile.k_start, row + tile.lo), last = min(tile.k_stop, stop + tile.hi);
      for (int64_t start = first; start < last; start += BLOCK_N) process_key_block(tile, start, last);
    }
    for (int64_t i = 0; i < task.count; ++i) store_block(buf.blocks[i]);
  }

  // Keys from `start` on, at most BLOCK_N and none from `last` on, against all query blocks of the task.
  void process_key_block(const Tile& tile, int64_t start, int64_t last) {
    const int64_t n = min(BLOCK_N, last - start), n_pad = round_up(n, TILE_ROWS);
    Dot::copy_rows(buf.k, dims.k_pitch, {p.k, p.dtype, task.batch, task.kv_head, start, n, n_pad, p.dim});
    Dot::copy_rows_vnni(buf.v, dims.v_pitch, {p.v, p.dtype, task.batch, task.kv_head, start, n, n_pad, p.v_dim});
    int64_t prefetched = start + n;
    for (int64_t b = 0; b < task.count; ++b) {
      QueryBlock& block = buf.blocks[b];
      const BandMask mask{block.row, block.stop, start, n, tile};
      if (mask.begin() >= mask.end()) continue;
      // Each query block prefetches a few rows of the next key block, which arrive during its computation.
      const int64_t until = min(prefetched + PREFETCH_ROWS, min(last, start + n + BLOCK_N));
      for (; prefetched < until; ++prefetched) {
        prefetch_row(p.k, p.dtype, task.batch, prefetched, task.kv_head, p.dim);
        prefetch_row(p.v, p.dtype, task.batch, prefetched, task.kv_head, p.v_dim);
      }
      for_each_visible_run(mask, [&](auto count, int64_t vector, int64_t begin, int64_t end) {
        QueryBlock vectors = block.from(vector);
        update<count.value>(vectors, mask.vectors(vector, count.value), begin, end);
      });
    }
  }

  // Whether the scale is so small that exp(score) is 1 for every score.
  static bool scale_is_negligible(const AttentionParams& p) { return __builtin_fabsf(p.scale) < 1e-20f; }

  // Scores are stored unscaled. Capped scores are stored scaled, as base 2 logarithms.
  static float stored_scale_log2(const AttentionParams& p) {
    return p.softcap != 0.0f || scale_is_negligible(p) ? 1.0f : __builtin_fabsf(p.scale) * LOG2_E;
  }

  // Loads a block's queries and the state (out, lse), which counts as one key with probability 1: m = lse and l = 1.
  void load_block(QueryBlock& b, int64_t index) {
    b.row = task.segment->q_start + index / p.group() * BLOCK_M;
    b.stop = min(b.row + BLOCK_M, task.segment->q_stop);
    b.head = task.kv_head * p.group() + index % p.group();
    const int64_t n = b.stop - b.row;
    load_queries(b, n);
    bool has_state = false;
    for (int64_t i = 0; i < BLOCK_M; ++i) {
      const float lse = i < n ? *lse_ptr(b, i) : -INF;
      b.m[i] = lse * LOG2_E / scale_log2;
      b.l[i] = lse == -INF ? 0.0f : 1.0f;
      has_state |= lse != -INF;
    }
    for (int64_t i = 0; i < dims.v_pitch * BLOCK_M; i += LANES) store(b.out + i, vec{});
    if (has_state) transpose_to_lanes(b.out, out_ptr(b, 0), p.out.row, n, p.v_dim);
  }

  void load_queries(QueryBlock& b, int64_t n) {
    if (PACK_FACTOR == 1 && p.dtype == Dtype::float32) {
      const void* first = row_ptr(p.q, p.dtype, task.batch, b.row, b.head);
      transpose_to_lanes(b.q, static_cast<const float*>(first), p.q.row, n, dims.words);
    } else {
      Dot::copy_rows(buf.q_rows, dims.k_pitch, {p.q, p.dtype, task.batch, b.head, b.row, n, n, p.dim});
      transpose_to_lanes(b.q, buf.q_rows, dims.k_pitch, n, dims.words);
    }
    if (p.scale < 0) {
      // A negative scale negates the queries, so that the largest product is the largest score.
      const ivec signs = broadcast((int32_t)(PACK_FACTOR == 2 ? 0x80008000 : 0x80000000));
      for (int64_t i = 0; i < dims.words * BLOCK_M; i += LANES) store(b.q + i, (vec)((ivec)load(b.q + i) ^ signs));
    }
    if (scale_is_negligible(p)) {
      for (int64_t i = 0; i < dims.words * BLOCK_M; i += LANES) store(b.q + i, vec{});
    }
  }

  // Writes a block's out and lse.
  void store_block(QueryBlock& b) {
    const int64_t n = b.stop - b.row;
    float inverse[BLOCK_M];
    for (int64_t i = 0; i < n; ++i) {
      inverse[i] = b.l[i] == 0.0f ? 0.0f : 1.0f / b.l[i];
      *lse_ptr(b, i) = b.l[i] == 0.0f ? -INF : LN_2 * scale_log2 * b.m[i] + __builtin_logf(b.l[i]);
    }
    transpose_from_lanes(b.out, n, p.v_dim, [&](int64_t i, int64_t d, vec values, int64_t count) {
      store(out_ptr(b, i) + d, values * inverse[i], count);
    });
  }

  // One step of the online softmax: C vectors of queries against keys [begin, end) of the key block.
  template <int C>
  void update(QueryBlock& b, const BandMask& mask, int64_t begin, int64_t end) {
    vec m[C];
    const bool masked = compute_scores<C>(b, mask, begin, end, m);
    vec rescale[C];
    RINGATTN_UNROLL
    for (int c = 0; c < C; ++c) {
      const vec m_old = load(b.m + c * LANES), m_new = max(m_old, m[c]);
      // While a query has seen no key, m is -inf. Any finite number may replace it, since out and l are 0.
      m[c] = select(m_new == broadcast(-INF), vec{}, m_new);
      rescale[c] = exp2((m_old - m[c]) * scale_log2);
      store(b.m + c * LANES, m_new);
      store(b.l + c * LANES, load(b.l + c * LANES) * rescale[c]);
    }
    if (masked) {
      compute_probs<C, true>(b, begin, end, m);
    } else {
      compute_probs<C, false>(b, begin, end, m);
    }
    for (int64_t d = 0; d < dims.v_pitch; d += TILE_ROWS) {
      vec acc[TILE_ROWS][C];
      fill(acc, vec{});
      multiply_accumulate<Dot>(acc, buf.v + begin / PACK_FACTOR * dims.v_pitch + d, 1, dims.v_pitch,
                               buf.scores + begin / PACK_FACTOR * BLOCK_M, BLOCK_M, (end - begin) / PACK_FACTOR);
      RINGATTN_UNROLL
      for (int r = 0; r < TILE_ROWS; ++r) {
        RINGATTN_UNROLL
        for (int c = 0; c < C; ++c) {
          float* out = b.out + (d + r) * BLOCK_M + c * LANES;
          store(out, fma(load(out), rescale[c], acc[r][c]));
        }
      }
    }
  }

  // Writes the scores of keys [begin, end), -inf where masked, and their maximum per query. Returns whether any is
  // masked.
  template <int C>
  bool compute_scores(const QueryBlock& b, const BandMask& mask, int64_t begin, int64_t end, vec (&m)[C]) {
    bool masked = false;
    RINGATTN_UNROLL
    for (int c = 0; c < C; ++c) m[c] = broadcast(-INF);
    for (int64_t j = begin; j < end; j += TILE_ROWS) {
      vec acc[TILE_ROWS][C];
      fill(acc, vec{});
      multiply_accumulate<Dot>(acc, buf.k + j * dims.k_pitch, dims.k_pitch, 1, b.q, BLOCK_M, dims.words);
      if (__builtin_expect(p.softcap != 0.0f, 0)) apply_softcap(acc);
      if (__builtin_expect(!mask.all_visible(j, TILE_ROWS), 0)) {
        masked = true;
        for (int r = 0; r < TILE_ROWS; ++r) {
          const LaneRange lanes = mask.visible_lanes(j + r);
          for (int c = 0; c < C; ++c) acc[r][c] = select(LaneRange::mask(lanes, c), acc[r][c], broadcast(-INF));
        }
      }
      RINGATTN_UNROLL
      for (int r = 0; r < TILE_ROWS; ++r) {
        RINGATTN_UNROLL
        for (int c = 0; c < C; ++c) {
          m[c] = max(m[c], acc[r][c]);
          store(buf.scores + (j + r) * BLOCK_M + c * LANES, acc[r][c]);
        }
      }
    }
    return masked;
  }

  template <int C>
  __attribute__((noinline)) void apply_softcap(vec (&scores)[TILE_ROWS][C]) {
    const float inner = __builtin_fabsf(p.scale) / p.softcap, outer = p.softcap * LOG2_E;
    for (int r = 0; r < TILE_ROWS; ++r) {
      for (int c = 0; c < C; ++c) scores[r][c] = tanh(scores[r][c] * inner) * outer;
    }
  }

  // Replaces scores by unnormalised probabilities exp(score - m), and adds these to l.
  template <int C, bool MASKED>
  void compute_probs(QueryBlock& b, int64_t begin, int64_t end, const vec (&m)[C]) {
    vec sums[C];
    RINGATTN_UNROLL
    for (int c = 0; c < C; ++c) sums[c] = vec{};
    for (int64_t j = begin; j < end; j += 2) {
      float *even = buf.scores + j * BLOCK_M, *odd = even + BLOCK_M;
      float* probs = buf.scores + j / PACK_FACTOR * BLOCK_M;
      RINGATTN_UNROLL
      for (int c = 0; c < C; ++c) {
        const vec even_prob = prob<MASKED>(load(even + c * LANES), m[c]);
        const vec odd_prob = prob<MASKED>(load(odd + c * LANES), m[c]);
        sums[c] += even_prob + odd_prob;
        Dot::store_rows_vnni(probs + c * LANES, BLOCK_M, even_prob, odd_prob);
      }
    }
    RINGATTN_UNROLL
    for (int c = 0; c < C; ++c) store(b.l + c * LANES, load(b.l + c * LANES) + sums[c]);
  }

  template <bool MASKED>
  vec prob(vec score, vec m) const {
    // The scale multiplies the difference, so that the largest score has probability 1 however large it is.
    const vec x = exp2((score - m) * scale_log2);
    return MASKED ? select(score == broadcast(-INF), vec{}, x) : x;
  }

  float* out_ptr(const QueryBlock& b, int64_t i) const {
    return p.out.data + task.batch * p.out.batch + (b.row + i) * p.out.row + b.head * p.out.head;
  }
  float* lse_ptr(const QueryBlock& b, int64_t i) const {
    return p.lse.data + task.batch * p.lse.batch + (b.row + i) * p.lse.row + b.head * p.lse.head;
  }
};

}  // namespace ringattn::RINGATTN_ISA
