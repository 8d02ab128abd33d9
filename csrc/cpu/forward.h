// Forward: blocks of queries stay in cache while chunks of keys go by; the running softmax is merged as they do.
//
// A vector's lanes are queries. So scores need no reduction across lanes, and keys and values are used as they lie in
// memory, an element broadcast at a time. Dao 2023, arXiv:2307.08691, for the order of the loops.
#pragma once
#include "microkernel.h"

namespace ringattn::RINGATTN_ISA {

template <class Dot>
struct Forward {
  static constexpr int64_t BLOCK_N = 64;        // keys
  static constexpr int64_t PREFETCH_ROWS = 12;  // of the next chunk, while a block computes
  static constexpr int PACK_FACTOR = Dot::PACK_FACTOR;

  struct Sizes {
    int64_t words;    // of a row of q and k
    int64_t k_pitch;  // q rows, too: whole vectors, as transposing wants
    int64_t v_pitch;
    int64_t blocks;  // of a task, so that its queries and outputs fill about half of a second-level cache
    explicit Sizes(const AttentionParams& p)
        : words((p.dim + PACK_FACTOR - 1) / PACK_FACTOR),
          k_pitch(round_up(words, LANES)),
          v_pitch(round_up(p.v_dim, TILE_ROWS)),
          blocks(max(1, min(16, (512 << 10) / (4 * BLOCK_M * (words + v_pitch))))) {}
  };

  // What a task keeps of a block of queries.
  struct Block {
    int64_t head, row, stop;
    float *q, *out;    // (words, BLOCK_M), (v_pitch, BLOCK_M)
    float *top, *sum;  // (BLOCK_M): the largest score so far, and the sum of weights beside it

    // The same without the first vectors of queries.
    Block from(int64_t vector) const {
      const int64_t lane = vector * LANES;
      return {head, row + lane, stop, q + lane, out + lane, top + lane, sum + lane};
    }
  };

  // Whether the scale is so small that every score is 0 beside 1.
  static bool is_flat(const AttentionParams& p) { return __builtin_fabsf(p.scale) < 1e-20f; }

  // Scores are kept unscaled, but where they are capped, in powers of two.
  static float factor_of(const AttentionParams& p) {
    return p.softcap != 0.0f || is_flat(p) ? 1.0f : __builtin_fabsf(p.scale) * LOG2_E;
  }

  static int64_t blocks_per_task(const AttentionParams& p) { return Sizes(p).blocks; }

  static int64_t scratch(const AttentionParams& p) {
    const Sizes s(p);
    const int64_t floats = s.blocks * BLOCK_M * (s.words + s.v_pitch + 2) +
                           BLOCK_N * (s.k_pitch + s.v_pitch + BLOCK_M) + BLOCK_M * s.k_pitch;
    return 4 * floats + 64 * (5 + 5 * s.blocks) + s.blocks * (int64_t)sizeof(Block);
  }

  const AttentionParams& p;
  const ForwardTask& task;
  const Sizes s;
  const float factor;  // of scores as they are kept, in powers of two
  float *k, *v, *scores, *rows;
  Block* blocks;

  Forward(const AttentionParams& problem, const ForwardTask& t, void* memory)
      : p(problem), task(t), s(problem), factor(factor_of(problem)) {
    Arena arena{static_cast<char*>(memory)};
    k = arena.take(BLOCK_N * s.k_pitch);
    v = arena.take(BLOCK_N * s.v_pitch);
    scores = arena.take(BLOCK_N * BLOCK_M);
    rows = arena.take(BLOCK_M * s.k_pitch);
    blocks = reinterpret_cast<Block*>(arena.take(s.blocks * sizeof(Block) / 4 + 1));
    for (int64_t i = 0; i < task.count; ++i) {
      Block& b = blocks[i];
      const int64_t index = task.first + i;
      b.row = task.segment->q_start + index / p.group() * BLOCK_M;
      b.stop = min(b.row + BLOCK_M, task.segment->q_stop);
      b.head = task.kv_head * p.group() + index % p.group();
      b.q = arena.take(s.words * BLOCK_M);
      b.out = arena.take(s.v_pitch * BLOCK_M);
      b.top = arena.take(BLOCK_M);
      b.sum = arena.take(BLOCK_M);
    }
  }

  void run() {
    for (int64_t i = 0; i < task.count; ++i) begin(blocks[i]);
    const int64_t row = blocks[0].row, stop = blocks[task.count - 1].stop;
    for (int64_t i = 0; i < task.segment->num_tiles; ++i) {
      const Tile& tile = *task.segment->tiles[i];
      const int64_t first = max(tile.k_start, row + tile.lo), last = min(tile.k_stop, stop + tile.hi);
      for (int64_t start = first; start < last; start += BLOCK_N) {
        const int64_t n = min(BLOCK_N, last - start), n_pad = round_up(n, TILE_ROWS);
        Dot::copy_rows(k, s.k_pitch, {p.k, p.dtype, task.batch, task.kv_head, start, n, n_pad, p.dim});
        Dot::copy_rows_vnni(v, s.v_pitch, {p.v, p.dtype, task.batch, task.kv_head, start, n, n_pad, p.v_dim});
        // While blocks compute with this chunk, the next one is asked of memory, a few rows for each.
        int64_t asked = start + n;
        for (int64_t b = 0; b < task.count; ++b) {
          const BandMask band{blocks[b].row, blocks[b].stop, start, n, tile};
          if (band.begin() >= band.end()) continue;
          for (const int64_t until = min(asked + PREFETCH_ROWS, min(last, start + n + BLOCK_N)); asked < until;
               ++asked) {
            prefetch_row(p.k, p.dtype, task.batch, asked, task.kv_head, p.dim);
            prefetch_row(p.v, p.dtype, task.batch, asked, task.kv_head, p.v_dim);
          }
          attend(blocks[b], band);
        }
      }
    }
    for (int64_t i = 0; i < task.count; ++i) end(blocks[i]);
  }

  // Loads a block's queries, and the state that it goes on from: as if one key of weight 1 had been seen.
  void begin(Block& b) {
    const int64_t n = b.stop - b.row;
    if (PACK_FACTOR == 1 && p.dtype == Dtype::float32) {
      const void* first = row_ptr(p.q, p.dtype, task.batch, b.row, b.head);
      transpose_to_lanes(b.q, static_cast<const float*>(first), p.q.row, n, s.words);
    } else {
      Dot::copy_rows(rows, s.k_pitch, {p.q, p.dtype, task.batch, b.head, b.row, n, n, p.dim});
      transpose_to_lanes(b.q, rows, s.k_pitch, n, s.words);
    }
    if (p.scale < 0) {
      // The sign goes to the queries, so that the largest product is the largest score.
      const ivec signs = broadcast((int32_t)(PACK_FACTOR == 2 ? 0x80008000 : 0x80000000));
      for (int64_t i = 0; i < s.words * BLOCK_M; i += LANES) store(b.q + i, (vec)((ivec)load(b.q + i) ^ signs));
    }
    if (is_flat(p)) {
      for (int64_t i = 0; i < s.words * BLOCK_M; i += LANES) store(b.q + i, vec{});
    }
    bool seen = false;
    for (int64_t i = 0; i < BLOCK_M; ++i) {
      const float lse = i < n ? *lse_of(b, i) : -INF;
      b.top[i] = lse * LOG2_E / factor;
      b.sum[i] = lse == -INF ? 0.0f : 1.0f;
      seen |= lse != -INF;
    }
    for (int64_t i = 0; i < s.v_pitch * BLOCK_M; i += LANES) store(b.out + i, vec{});
    if (seen) transpose_to_lanes(b.out, out_of(b, 0), p.out.row, n, p.v_dim);
  }

  void end(Block& b) {
    const int64_t n = b.stop - b.row;
    float inverse[BLOCK_M];
    for (int64_t i = 0; i < n; ++i) {
      inverse[i] = b.sum[i] == 0.0f ? 0.0f : 1.0f / b.sum[i];
      *lse_of(b, i) = b.sum[i] == 0.0f ? -INF : LN_2 * factor * b.top[i] + __builtin_logf(b.sum[i]);
    }
    transpose_from_lanes(b.out, n, p.v_dim, [&](int64_t i, int64_t d, vec values, int64_t count) {
      store(out_of(b, i) + d, values * inverse[i], count);
    });
  }

  void attend(Block& b, const BandMask& band) {
    for_each_visible_run(band, [&](auto count, int64_t vector, int64_t begin, int64_t end) {
      Block part = b.from(vector);
      attend<count.value>(part, band.part(vector, count.value), begin, end);
    });
  }

  template <int C>
  void attend(Block& b, const BandMask& band, int64_t begin, int64_t end) {
    vec top[C];
    const bool masked = score<C>(b, band, begin, end, top);
    vec rescale[C];
    RINGATTN_UNROLL
    for (int c = 0; c < C; ++c) {
      const vec before = load(b.top + c * LANES), now = max(before, top[c]);
      // Nothing seen yet, neither before nor now: any finite number will do, for there is nothing to rescale.
      top[c] = select(now == broadcast(-INF), vec{}, now);
      rescale[c] = exp2((before - top[c]) * factor);
      store(b.top + c * LANES, now);
      store(b.sum + c * LANES, load(b.sum + c * LANES) * rescale[c]);
    }
    if (masked) {
      weigh<C, true>(b, begin, end, top);
    } else {
      weigh<C, false>(b, begin, end, top);
    }
    for (int64_t d = 0; d < s.v_pitch; d += TILE_ROWS) {
      vec sums[TILE_ROWS][C];
      fill(sums, vec{});
      multiply<Dot>(sums, v + begin / PACK_FACTOR * s.v_pitch + d, 1, s.v_pitch, scores + begin / PACK_FACTOR * BLOCK_M,
                    BLOCK_M, (end - begin) / PACK_FACTOR);
      RINGATTN_UNROLL
      for (int r = 0; r < TILE_ROWS; ++r) {
        RINGATTN_UNROLL
        for (int c = 0; c < C; ++c) {
          float* out = b.out + (d + r) * BLOCK_M + c * LANES;
          store(out, fma(load(out), rescale[c], sums[r][c]));
        }
      }
    }
  }

  // Writes the products of keys and queries, -inf where the mask forbids, and their largest; says whether it forbids
  // any. With a softcap, it is the capped scores, in powers of two.
  template <int C>
  bool score(const Block& b, const BandMask& band, int64_t begin, int64_t end, vec (&top)[C]) {
    bool masked = false;
    RINGATTN_UNROLL
    for (int c = 0; c < C; ++c) top[c] = broadcast(-INF);
    for (int64_t j = begin; j < end; j += TILE_ROWS) {
      vec sums[TILE_ROWS][C];
      fill(sums, vec{});
      multiply<Dot>(sums, k + j * s.k_pitch, s.k_pitch, 1, b.q, BLOCK_M, s.words);
      if (__builtin_expect(p.softcap != 0.0f, 0)) cap(sums);
      if (__builtin_expect(!band.whole(j, TILE_ROWS), 0)) {
        masked = true;
        for (int r = 0; r < TILE_ROWS; ++r) {
          const LaneRange lanes = band.lanes(j + r);
          for (int c = 0; c < C; ++c) sums[r][c] = select(LaneRange::mask(lanes, c), sums[r][c], broadcast(-INF));
        }
      }
      RINGATTN_UNROLL
      for (int r = 0; r < TILE_ROWS; ++r) {
        RINGATTN_UNROLL
        for (int c = 0; c < C; ++c) {
          top[c] = max(top[c], sums[r][c]);
          store(scores + (j + r) * BLOCK_M + c * LANES, sums[r][c]);
        }
      }
    }
    return masked;
  }

  template <int C>
  __attribute__((noinline)) void cap(vec (&sums)[TILE_ROWS][C]) {
    const float inner = __builtin_fabsf(p.scale) / p.softcap, outer = p.softcap * LOG2_E;
    for (int r = 0; r < TILE_ROWS; ++r) {
      for (int c = 0; c < C; ++c) sums[r][c] = tanh(sums[r][c] * inner) * outer;
    }
  }

  // Turns scores into weights, in place, and adds them to the blocks' sums.
  template <int C, bool MASKED>
  void weigh(Block& b, int64_t begin, int64_t end, const vec (&top)[C]) {
    vec sums[C];
    RINGATTN_UNROLL
    for (int c = 0; c < C; ++c) sums[c] = vec{};
    for (int64_t j = begin; j < end; j += 2) {
      float *even = scores + j * BLOCK_M, *odd = even + BLOCK_M, *to = scores + j / PACK_FACTOR * BLOCK_M;
      RINGATTN_UNROLL
      for (int c = 0; c < C; ++c) {
        const vec a = weight<MASKED>(load(even + c * LANES), top[c]);
        const vec z = weight<MASKED>(load(odd + c * LANES), top[c]);
        sums[c] += a + z;
        Dot::store_rows_vnni(to + c * LANES, BLOCK_M, a, z);
      }
    }
    RINGATTN_UNROLL
    for (int c = 0; c < C; ++c) store(b.sum + c * LANES, load(b.sum + c * LANES) + sums[c]);
  }

  template <bool MASKED>
  vec weight(vec score, vec top) const {
    // Scaled after the difference: the largest has weight 1, however large it is.
    const vec w = exp2((score - top) * factor);
    return MASKED ? select(score == broadcast(-INF), vec{}, w) : w;
  }

  float* out_of(const Block& b, int64_t i) const {
    return p.out.data + task.batch * p.out.batch + (b.row + i) * p.out.row + b.head * p.out.head;
  }
  float* lse_of(const Block& b, int64_t i) const {
    return p.lse.data + task.batch * p.lse.batch + (b.row + i) * p.lse.row + b.head * p.lse.head;
  }
};

}  // namespace ringattn::RINGATTN_ISA
