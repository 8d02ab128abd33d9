// The decode kernel: a few query rows of one kv head against keys in pages.
//
// In products, a vector's lanes are dims: keys and values keep their layout in memory, and are read once for all query
// rows of the head's group. In the softmax, lanes are (key, row) pairs, in the order in which sums over lanes return
// them. While one key block is computed, the next one is prefetched.
#pragma once
#include "arena.h"
#include "row_access.h"

namespace ringattn::RINGATTN_ISA {

// Reads elements of the cache as fp32, SPAN elements into VECS vectors. A 32-bit word has two bf16 elements, and one
// instruction widens either: so a span of bf16 has its even elements first, and then its odd ones. Queries and outputs
// are stored in the same order.
template <Dtype DTYPE>
struct SpanReader {
  static constexpr int VECS = DTYPE == Dtype::bfloat16 ? 2 : 1, SPAN = VECS * LANES;
  static constexpr int64_t BYTES = DTYPE == Dtype::float32 ? 4 : 2;  // of an element

  // Reads elements [e, e + n) of a row, n <= SPAN. The rest of the span is zero.
  RINGATTN_INLINE void read(const char* row, int64_t e, int64_t n, vec (&to)[VECS]) {
    const char* from = row + BYTES * e;
    if constexpr (DTYPE == Dtype::float32) {
      to[0] = load(reinterpret_cast<const float*>(from), n);
    } else if constexpr (DTYPE == Dtype::bfloat16) {
      uvec words{};
      if (n == SPAN) {
        std::memcpy(&words, from, sizeof words);
      } else {
        std::memcpy(&words, from, BYTES * n);
      }
      to[0] = (vec)(words << 16);
      to[VECS - 1] = (vec)(words & 0xffff0000u);
    } else {
      to[0] = read_fp16(from, n);
    }
  }

  RINGATTN_INLINE vec read_fp16(const char* from, int64_t n) {
#if defined(RINGATTN_AVX512)
    if (n == LANES) return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(RINGATTN_AVX2)
    if (n == LANES) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
    float x[LANES] = {};
    convert_to_fp32(x, from, DTYPE, n);
    return load(x);
  }

  // The place of element e in a row of spans.
  RINGATTN_INLINE int64_t place(int64_t e) { return e / SPAN * SPAN + e % VECS * LANES + e % SPAN / VECS; }
};

template <int H>
RINGATTN_INLINE void lane_sums_step(vec (&x)[LANES]) {
  using Lanes = std::make_integer_sequence<int, LANES>;
  RINGATTN_UNROLL
  for (int i = 0; i < LANES; i += 2 * H) {
    x[i] = combine_halves<H, false>(x[i], x[i + H], Lanes{}) + combine_halves<H, true>(x[i], x[i + H], Lanes{});
  }
}

// A vector whose lane i is the sum over the lanes of x[i]. Overwrites x.
RINGATTN_INLINE vec lane_sums(vec (&x)[LANES]) {
  lane_sums_step<1>(x);
  lane_sums_step<2>(x);
  if constexpr (LANES > 4) lane_sums_step<4>(x);
  if constexpr (LANES > 8) lane_sums_step<8>(x);
  return x[0];
}

// ROWS query rows are computed at a time.
template <Dtype DTYPE, int ROWS>
struct DecodeKernel : SpanReader<DTYPE> {
  using SpanReader<DTYPE>::VECS, SpanReader<DTYPE>::SPAN, SpanReader<DTYPE>::BYTES, SpanReader<DTYPE>::read,
      SpanReader<DTYPE>::place;
  static constexpr int64_t BLOCK_N = 32;                      // keys of a key block
  static constexpr int64_t KEYS = LANES / ROWS;               // keys of a vector of (key, row) pairs
  static constexpr int64_t VALUE_VECS = LANES == 16 ? 4 : 2;  // vectors of values that are accumulated at a time

  struct KeyBlock {
    int64_t n = 0;
    bool all_visible;  // to each row
    const char *k[BLOCK_N], *v[BLOCK_N];
    int32_t positions[BLOCK_N * ROWS];  // each key's position, ROWS times
  };

  struct BufferDims {
    int64_t rows, rows_pad;    // query rows, and padded to a multiple of ROWS
    int64_t k_pitch, v_pitch;  // whole spans
    explicit BufferDims(const DecodeParams& p)
        : rows(p.tokens * p.group()),
          rows_pad(round_up(rows, ROWS)),
          k_pitch(round_up(p.dim, SPAN)),
          v_pitch(round_up(p.v_dim, SPAN)) {}
  };

  struct Buffers {
    float *q, *out;         // (rows_pad, k_pitch), (rows_pad, v_pitch), in the order of spans
    float* scores;          // (BLOCK_N, ROWS): then probabilities
    float *m, *l;           // (rows_pad, KEYS): the running maximum, and the running sum for each key of a vector
    int32_t *first, *stop;  // (rows_pad, KEYS): the positions that each row sees

    Buffers(Arena& arena, const BufferDims& dims) {
      q = arena.take(dims.rows_pad * dims.k_pitch);
      out = arena.take(dims.rows_pad * dims.v_pitch);
      scores = arena.take(BLOCK_N * ROWS);
      m = arena.take(dims.rows_pad * KEYS);
      l = arena.take(dims.rows_pad * KEYS);
      first = arena.take<int32_t>(dims.rows_pad * KEYS);
      stop = arena.take<int32_t>(dims.rows_pad * KEYS);
    }
  };

  const DecodeParams& p;
  const DecodeTask& task;
  const BufferDims dims;
  const Buffers buf;
  // Positions that any row sees, and positions that every row sees.
  int32_t any_first = INT32_MAX, any_stop = 0, all_first = 0, all_stop = INT32_MAX;
  int64_t entry, slot = 0;  // where the next key block begins

  static int64_t scratch(const DecodeParams& p) { return scratch_bytes<Buffers>(BufferDims(p)); }

  DecodeKernel(const DecodeParams& params, const DecodeTask& t, void* memory)
      : p(params), task(t), dims(params), buf(allocate<Buffers>(memory, dims)), entry(t.first) {}

  void run() {
    load_rows();
    KeyBlock blocks[2];
    gather_keys(blocks[0]);
    for (int current = 0; blocks[current].n; current = 1 - current) {
      gather_keys(blocks[1 - current]);
      const KeyBlock& next = blocks[1 - current].n ? blocks[1 - current] : blocks[current];
      for (int64_t r = 0; r < dims.rows; r += ROWS) update(r, blocks[current], r ? blocks[current] : next);
    }
    store_rows();
  }

  // The place of row r's statistics for key x of a vector. Those of rows [r, r + ROWS) are the vector at r * KEYS.
  int64_t stat_index(int64_t r, int64_t x) const { return r / ROWS * LANES + x * ROWS + r % ROWS; }

  void load_rows() {
    std::memset(buf.q, 0, 4 * dims.rows_pad * dims.k_pitch);
    std::memset(buf.out, 0, 4 * dims.rows_pad * dims.v_pitch);
    for (int64_t r = 0; r < dims.rows_pad; ++r) {
      const int64_t token = task.batch * p.tokens + r / p.group();
      for (int64_t x = 0; x < KEYS; ++x) {
        const int64_t i = stat_index(r, x);
        buf.m[i] = -INF, buf.l[i] = 0;
        buf.first[i] = r < dims.rows ? p.first[token] : 0, buf.stop[i] = r < dims.rows ? p.stop[token] : 0;
      }
      if (r >= dims.rows) continue;
      any_first = min(any_first, p.first[token]), any_stop = max(any_stop, p.stop[token]);
      all_first = max(all_first, p.first[token]), all_stop = min(all_stop, p.stop[token]);
      const char* q = row_ptr(p.q, DTYPE, task.batch, r / p.group(), task.kv_head * p.group() + r % p.group());
      for (int64_t e = 0; e < p.dim; ++e) {
        convert_to_fp32(buf.q + r * dims.k_pitch + place(e), q + BYTES * e, DTYPE, 1);
      }
    }
  }

  // Collects the next BLOCK_N keys that any row sees.
  void gather_keys(KeyBlock& block) {
    int64_t n = 0;
    bool all = true;
    for (; entry < task.stop; ++entry, slot = 0) {
      const char* k = row_ptr(p.k, DTYPE, p.pages[entry], 0, task.kv_head);
      const char* v = row_ptr(p.v, DTYPE, p.pages[entry], 0, task.kv_head);
      for (; slot < p.page_size && n < BLOCK_N; ++slot) {
        const int32_t position = p.slots[entry * p.page_size + slot];
        if (position < any_first || position >= any_stop) continue;
        all = all && position >= all_first && position < all_stop;
        block.k[n] = k + slot * p.k.row * BYTES, block.v[n] = v + slot * p.v.row * BYTES;
        for (int i = 0; i < ROWS; ++i) block.positions[n * ROWS + i] = position;
        ++n;
      }
      if (n == BLOCK_N) break;
    }
    block.n = n, block.all_visible = all && n % KEYS == 0;
    if (!n) return;
    // The rest of the block repeats the last key at a position that no row sees.
    for (int64_t j = n; j < BLOCK_N; ++j) {
      block.k[j] = block.k[n - 1], block.v[j] = block.v[n - 1];
      for (int i = 0; i < ROWS; ++i) block.positions[j * ROWS + i] = -1;
    }
  }

  // One step of the online softmax: rows [r, r + ROWS) against a key block. Prefetches the block `next`.
  void update(int64_t r, const KeyBlock& block, const KeyBlock& next) {
    const int64_t n_pad = round_up(block.n, KEYS);
    for (int64_t j = 0; j < n_pad; j += KEYS) store(buf.scores + j * ROWS, dot_products(r, block.k + j, next.k + j));
    float rescale[LANES];
    store(rescale, softmax(r, block, n_pad));
    for (int64_t e = 0; e < p.v_dim;) {
      const bool wide = e + VALUE_VECS * LANES <= p.v_dim;
      if (wide) {
        accumulate_values<VALUE_VECS * LANES / SPAN>(r, block, next, e, SPAN, rescale);
      } else {
        accumulate_values<1>(r, block, next, e, min(SPAN, p.v_dim - e), rescale);
      }
      e += wide ? VALUE_VECS * LANES : SPAN;
    }
  }

  // acc[x * ROWS + i] += products of elements [e, e + n) of key x and query row i, lane by lane.
  RINGATTN_INLINE void multiply_accumulate(const float* q, int64_t pitch, const char* const* k, int64_t e, int64_t n,
                                           vec (&acc)[LANES]) {
    RINGATTN_UNROLL
    for (int x = 0; x < KEYS; ++x) {
      vec key[VECS];
      read(k[x], e, n, key);
      RINGATTN_UNROLL
      for (int i = 0; i < ROWS; ++i) {
        RINGATTN_UNROLL
        for (int part = 0; part < VECS; ++part) {
          acc[x * ROWS + i] = fma(key[part], load(q + i * pitch + e + part * LANES), acc[x * ROWS + i]);
        }
      }
    }
  }

  // The dot products of KEYS keys and ROWS query rows, as (key, row) pairs.
  vec dot_products(int64_t r, const char* const* k, const char* const* next) {
    const float* q = buf.q + r * dims.k_pitch;
    vec acc[LANES] = {};
    int64_t e = 0;
    for (; e + SPAN <= p.dim; e += SPAN) {
      RINGATTN_UNROLL
      for (int x = 0; x < KEYS; ++x) __builtin_prefetch(next[x] + BYTES * e);
      multiply_accumulate(q, dims.k_pitch, k, e, SPAN, acc);
    }
    if (e < p.dim) multiply_accumulate(q, dims.k_pitch, k, e, p.dim - e, acc);
    return lane_sums(acc);
  }

  // Replaces products by unnormalised probabilities exp(score - m), and updates m and l. Returns the factor that
  // rescales the rows' outputs.
  vec softmax(int64_t r, const KeyBlock& block, int64_t n_pad) {
    ivec first, stop;
    std::memcpy(&first, buf.first + r * KEYS, sizeof first);
    std::memcpy(&stop, buf.stop + r * KEYS, sizeof stop);
    const vec m_old = load(buf.m + r * KEYS);
    vec m = m_old;
    for (int64_t j = 0; j < n_pad * ROWS; j += LANES) {
      vec x = load(buf.scores + j);
      if (p.softcap != 0) {
        x = tanh(x * (p.scale / p.softcap)) * (p.softcap * LOG2_E);
      } else {
        x = x * (p.scale * LOG2_E);
      }
      if (!block.all_visible) {
        ivec position;
        std::memcpy(&position, block.positions + j, sizeof position);
        x = select((position >= first) & (position < stop), x, broadcast(-INF));
      }
      store(buf.scores + j, x);
      m = max(m, x);
    }
    m = max_over_keys(m);
    const vec base = select(m > broadcast(-INF), m, vec{});
    const vec rescale = exp2(m_old - base);
    vec l = load(buf.l + r * KEYS) * rescale;
    for (int64_t j = 0; j < n_pad * ROWS; j += LANES) {
      const vec x = load(buf.scores + j);
      const vec prob = select(x > broadcast(-INF), exp2(x - base), vec{});
      store(buf.scores + j, prob);
      l = l + prob;
    }
    store(buf.m + r * KEYS, m);
    store(buf.l + r * KEYS, l);
    return rescale;
  }

  // Each row's maximum over the keys of a vector, in all of the row's lanes.
  RINGATTN_INLINE vec max_over_keys(vec x) {
    auto fold = [&]<int H>(std::integral_constant<int, H>) {
      if constexpr (H >= ROWS && H < LANES) {
        x = max(x, [&]<int... K>(std::integer_sequence<int, K...>) {
          return __builtin_shufflevector(x, x, (K ^ H)...);
        }(std::make_integer_sequence<int, LANES>{}));
      }
    };
    fold(std::integral_constant<int, 1>{});
    fold(std::integral_constant<int, 2>{});
    fold(std::integral_constant<int, 4>{});
    fold(std::integral_constant<int, 8>{});
    return x;
  }

  // out = out * rescale + probabilities . values, for SPANS spans of dims from e on. A single span may have n < SPAN
  // dims.
  template <int SPANS>
  void accumulate_values(int64_t r, const KeyBlock& block, const KeyBlock& next, int64_t e, int64_t n,
                         const float (&rescale)[LANES]) {
    constexpr int TILE_VECS = SPANS * VECS;
    float* out = buf.out + r * dims.v_pitch + e;
    vec acc[ROWS][TILE_VECS];
    RINGATTN_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      RINGATTN_UNROLL
      for (int x = 0; x < TILE_VECS; ++x) acc[i][x] = load(out + i * dims.v_pitch + x * LANES) * rescale[i];
    }
    for (int64_t j = 0; j < block.n; ++j) {
      RINGATTN_UNROLL
      for (int s = 0; s < SPANS; ++s) {
        __builtin_prefetch(next.v[j] + BYTES * (e + s * SPAN));
        vec value[VECS];
        read(block.v[j], e + s * SPAN, n, value);
        RINGATTN_UNROLL
        for (int i = 0; i < ROWS; ++i) {
          const vec prob = broadcast(buf.scores[j * ROWS + i]);
          RINGATTN_UNROLL
          for (int part = 0; part < VECS; ++part) {
            acc[i][s * VECS + part] = fma(value[part], prob, acc[i][s * VECS + part]);
          }
        }
      }
    }
    RINGATTN_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      RINGATTN_UNROLL
      for (int x = 0; x < TILE_VECS; ++x) store(out + i * dims.v_pitch + x * LANES, acc[i][x]);
    }
  }

  // Writes the task's out and lse.
  void store_rows() {
    for (int64_t r = 0; r < dims.rows; ++r) {
      float l = 0;
      for (int64_t x = 0; x < KEYS; ++x) l += buf.l[stat_index(r, x)];
      const float inverse = l > 0 ? 1.0f / l : 0.0f;
      for (int64_t e = 0; e < p.v_dim; ++e) {
        task.out[r * p.v_dim + e] = buf.out[r * dims.v_pitch + place(e)] * inverse;
      }
      task.lse[r] = l > 0 ? (buf.m[stat_index(r, 0)] + __builtin_log2f(l)) * LN_2 : -INF;
    }
  }
};

// Calls visit with a null pointer to the kernel of a call: 4 rows at a time, or a single row.
template <class Visit>
RINGATTN_INLINE auto with_decode_kernel(const DecodeParams& p, const Visit& visit) {
  auto by_rows = [&]<Dtype DTYPE>(std::integral_constant<Dtype, DTYPE>) {
    using One = DecodeKernel<DTYPE, 1>;
    using Four = DecodeKernel<DTYPE, 4>;
    return p.tokens * p.group() == 1 ? visit(static_cast<One*>(nullptr)) : visit(static_cast<Four*>(nullptr));
  };
  if (p.dtype == Dtype::float32) return by_rows(std::integral_constant<Dtype, Dtype::float32>{});
  if (p.dtype == Dtype::bfloat16) return by_rows(std::integral_constant<Dtype, Dtype::bfloat16>{});
  return by_rows(std::integral_constant<Dtype, Dtype::float16>{});
}

RINGATTN_INLINE int64_t decode_scratch(const DecodeParams& p) {
  return with_decode_kernel(p, [&]<class Kernel>(Kernel*) { return Kernel::scratch(p); });
}

RINGATTN_INLINE void decode(const DecodeParams& p, const DecodeTask& task, void* memory) {
  with_decode_kernel(p, [&]<class Kernel>(Kernel*) { Kernel(p, task, memory).run(); });
}

}  // namespace ringattn::RINGATTN_ISA
