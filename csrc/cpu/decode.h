// Decoding: a few query rows of one kv head against keys that lie in pages.
//
// In products a vector's lanes are dims: keys and values are used as they lie in memory, each read once for all query
// rows of the head's group. In the softmax its lanes are pairs of a key and a row, in the order in which sums over
// lanes come out. While a block of keys is computed, the next one is on its way from memory.
#pragma once
#include "dot_traits.h"

namespace ringattn::RINGATTN_ISA {

// How elements of the cache become fp32. bfloat16 is read in words of two elements, each of which is widened by one
// instruction: so the even elements of SPAN come first, then the odd ones, and queries and outputs lie likewise.
template <Dtype DTYPE>
struct Elements {
  static constexpr int PARTS = DTYPE == Dtype::bfloat16 ? 2 : 1, SPAN = PARTS * LANES;
  static constexpr int64_t BYTES = DTYPE == Dtype::float32 ? 4 : 2;

  // Elements [e, e + n) of a row, n <= SPAN; what is beyond is zero.
  RINGATTN_INLINE void read(const char* row, int64_t e, int64_t n, vec (&to)[PARTS]) {
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
      to[PARTS - 1] = (vec)(words & 0xffff0000u);
    } else {
      to[0] = widened_halves(from, n);
    }
  }

  RINGATTN_INLINE vec widened_halves(const char* from, int64_t n) {
#if defined(RINGATTN_AVX512)
    if (n == LANES) return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(RINGATTN_AVX2)
    if (n == LANES) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
    float x[LANES] = {};
    convert_to_fp32(x, from, DTYPE, n);
    return load(x);
  }

  // Where element e lies.
  RINGATTN_INLINE int64_t place(int64_t e) { return e / SPAN * SPAN + e % PARTS * LANES + e % SPAN / PARTS; }
};

template <int H>
RINGATTN_INLINE void sum_step(vec (&x)[LANES]) {
  using Lanes = std::make_integer_sequence<int, LANES>;
  RINGATTN_UNROLL
  for (int i = 0; i < LANES; i += 2 * H) {
    x[i] = combine_halves<H, false>(x[i], x[i + H], Lanes{}) + combine_halves<H, true>(x[i], x[i + H], Lanes{});
  }
}

// The sum over the lanes of each vector: that of x[i] in lane i.
RINGATTN_INLINE vec lane_sums(vec (&x)[LANES]) {
  sum_step<1>(x);
  sum_step<2>(x);
  if constexpr (LANES > 4) sum_step<4>(x);
  if constexpr (LANES > 8) sum_step<8>(x);
  return x[0];
}

// ROWS query rows are computed at a time.
template <Dtype DTYPE, int ROWS>
struct Decode : Elements<DTYPE> {
  using Elements<DTYPE>::PARTS, Elements<DTYPE>::SPAN, Elements<DTYPE>::BYTES, Elements<DTYPE>::read,
      Elements<DTYPE>::place;
  static constexpr int64_t BLOCK_KEYS = 32, KEYS = LANES / ROWS, STRIP = LANES == 16 ? 4 : 2;

  struct Block {
    int64_t n = 0;
    bool all_seen;  // by each row
    const char *k[BLOCK_KEYS], *v[BLOCK_KEYS];
    int32_t positions[BLOCK_KEYS * ROWS];  // each as often as there are rows
  };

  const DecodeParams& p;
  const DecodeTask& task;
  const int64_t rows, rows_pad, pitch, v_pitch;
  float *q, *out, *weights, *top, *sum;
  int32_t *first, *stop;
  int32_t lowest, highest, all_first, all_stop;  // what some row sees, and what each does
  int64_t entry, slot = 0;                       // where the next block begins

  static int64_t scratch(const DecodeParams& p) {
    const int64_t rows = round_up(p.tokens * p.group(), ROWS);
    const int64_t floats = rows * (round_up(p.dim, SPAN) + round_up(p.v_dim, SPAN) + 4 * KEYS) + BLOCK_KEYS * ROWS;
    return 4 * floats + 64 * 8;
  }

  Decode(const DecodeParams& problem, const DecodeTask& t, void* memory)
      : p(problem),
        task(t),
        rows(p.tokens * p.group()),
        rows_pad(round_up(rows, ROWS)),
        pitch(round_up(p.dim, SPAN)),
        v_pitch(round_up(p.v_dim, SPAN)),
        entry(t.first) {
    char* base = static_cast<char*>(memory);
    auto take = [&](int64_t floats) {
      float* piece = reinterpret_cast<float*>(base);
      base += round_up(4 * floats, 64);
      return piece;
    };
    q = take(rows_pad * pitch), out = take(rows_pad * v_pitch), weights = take(BLOCK_KEYS * ROWS);
    top = take(rows_pad * KEYS), sum = take(rows_pad * KEYS);
    first = reinterpret_cast<int32_t*>(take(rows_pad * KEYS)), stop = reinterpret_cast<int32_t*>(take(rows_pad * KEYS));
  }

  void run() {
    begin();
    Block blocks[2];
    gather(blocks[0]);
    for (int now = 0; blocks[now].n; now = 1 - now) {
      gather(blocks[1 - now]);
      const Block& next = blocks[1 - now].n ? blocks[1 - now] : blocks[now];
      for (int64_t r = 0; r < rows; r += ROWS) attend(r, blocks[now], r ? blocks[now] : next);
    }
    end();
  }

  // A row's statistics stand in a lane for each key of a vector: those of rows r to r + ROWS begin at r * KEYS.
  int64_t lane(int64_t r, int64_t x) const { return r / ROWS * LANES + x * ROWS + r % ROWS; }

  void begin() {
    std::memset(q, 0, 4 * rows_pad * pitch);
    std::memset(out, 0, 4 * rows_pad * v_pitch);
    lowest = all_stop = INT32_MAX, highest = all_first = 0;
    for (int64_t r = 0; r < rows_pad; ++r) {
      const int64_t token = task.batch * p.tokens + r / p.group();
      for (int64_t x = 0; x < KEYS; ++x) {
        top[lane(r, x)] = -INF, sum[lane(r, x)] = 0;
        first[lane(r, x)] = r < rows ? p.first[token] : 0, stop[lane(r, x)] = r < rows ? p.stop[token] : 0;
      }
      if (r >= rows) continue;
      lowest = min(lowest, p.first[token]), highest = max(highest, p.stop[token]);
      all_first = max(all_first, p.first[token]), all_stop = min(all_stop, p.stop[token]);
      const char* from = row_ptr(p.q, DTYPE, task.batch, r / p.group(), task.kv_head * p.group() + r % p.group());
      for (int64_t e = 0; e < p.dim; ++e) convert_to_fp32(q + r * pitch + place(e), from + BYTES * e, DTYPE, 1);
    }
  }

  // The next keys that some row sees.
  void gather(Block& block) {
    int64_t n = 0;
    bool all = true;
    for (; entry < task.stop; ++entry, slot = 0) {
      const char* k = row_ptr(p.k, DTYPE, p.pages[entry], 0, task.kv_head);
      const char* v = row_ptr(p.v, DTYPE, p.pages[entry], 0, task.kv_head);
      for (; slot < p.page_size && n < BLOCK_KEYS; ++slot) {
        const int32_t position = p.slots[entry * p.page_size + slot];
        if (position < lowest || position >= highest) continue;
        all = all && position >= all_first && position < all_stop;
        block.k[n] = k + slot * p.k.row * BYTES, block.v[n] = v + slot * p.v.row * BYTES;
        for (int i = 0; i < ROWS; ++i) block.positions[n * ROWS + i] = position;
        ++n;
      }
      if (n == BLOCK_KEYS) break;
    }
    block.n = n, block.all_seen = all && n % KEYS == 0;
    if (!n) return;
    // What is left of the last vector repeats the last key, at a position that nobody sees.
    for (int64_t j = n; j < BLOCK_KEYS; ++j) {
      block.k[j] = block.k[n - 1], block.v[j] = block.v[n - 1];
      for (int i = 0; i < ROWS; ++i) block.positions[j * ROWS + i] = -1;
    }
  }

  void attend(int64_t r, const Block& block, const Block& next) {
    const int64_t n_pad = round_up(block.n, KEYS);
    for (int64_t j = 0; j < n_pad; j += KEYS) store(weights + j * ROWS, dot(r, block.k + j, next.k + j));
    float decay[LANES];
    store(decay, softmax(r, block, n_pad));
    for (int64_t e = 0; e < p.v_dim;) {
      const bool wide = e + STRIP * LANES <= p.v_dim;
      if (wide) {
        weigh<STRIP * LANES / SPAN>(r, block, next, e, SPAN, decay);
      } else {
        weigh<1>(r, block, next, e, min(SPAN, p.v_dim - e), decay);
      }
      e += wide ? STRIP * LANES : SPAN;
    }
  }

  // Scores of ROWS queries with KEYS keys.
  RINGATTN_INLINE void multiply(const float* q, int64_t pitch, const char* const* k, int64_t e, int64_t n,
                                vec (&acc)[LANES]) {
    RINGATTN_UNROLL
    for (int x = 0; x < KEYS; ++x) {
      vec key[PARTS];
      read(k[x], e, n, key);
      RINGATTN_UNROLL
      for (int i = 0; i < ROWS; ++i) {
        RINGATTN_UNROLL
        for (int part = 0; part < PARTS; ++part) {
          acc[x * ROWS + i] = fma(key[part], load(q + i * pitch + e + part * LANES), acc[x * ROWS + i]);
        }
      }
    }
  }

  vec dot(int64_t r, const char* const* k, const char* const* next) {
    vec acc[LANES] = {};
    int64_t e = 0;
    for (; e + SPAN <= p.dim; e += SPAN) {
      RINGATTN_UNROLL
      for (int x = 0; x < KEYS; ++x) __builtin_prefetch(next[x] + BYTES * e);
      multiply(q + r * pitch, pitch, k, e, SPAN, acc);
    }
    if (e < p.dim) multiply(q + r * pitch, pitch, k, e, p.dim - e, acc);
    return lane_sums(acc);
  }

  // Turns scores into weights, in place; returns what the rows' sums so far are to be multiplied by.
  vec softmax(int64_t r, const Block& block, int64_t n_pad) {
    ivec from, to;
    std::memcpy(&from, first + r * KEYS, sizeof from);
    std::memcpy(&to, stop + r * KEYS, sizeof to);
    const vec before = load(top + r * KEYS);
    vec highest = before;
    for (int64_t j = 0; j < n_pad * ROWS; j += LANES) {
      vec x = load(weights + j);
      if (p.softcap != 0) {
        x = tanh(x * (p.scale / p.softcap)) * (p.softcap * LOG2_E);
      } else {
        x = x * (p.scale * LOG2_E);
      }
      if (!block.all_seen) {
        ivec at;
        std::memcpy(&at, block.positions + j, sizeof at);
        x = select((at >= from) & (at < to), x, broadcast(-INF));
      }
      store(weights + j, x);
      highest = max(highest, x);
    }
    highest = over_keys(highest);
    const vec base = select(highest > broadcast(-INF), highest, vec{});
    const vec decay = exp2(before - base);
    vec total = load(sum + r * KEYS) * decay;
    for (int64_t j = 0; j < n_pad * ROWS; j += LANES) {
      const vec x = load(weights + j);
      const vec power = select(x > broadcast(-INF), exp2(x - base), vec{});
      store(weights + j, power);
      total = total + power;
    }
    store(top + r * KEYS, highest);
    store(sum + r * KEYS, total);
    return decay;
  }

  // The largest of the lanes of each row, in all of them.
  RINGATTN_INLINE vec over_keys(vec x) {
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

  template <int SPANS>
  void weigh(int64_t r, const Block& block, const Block& next, int64_t e, int64_t n, const float (&decay)[LANES]) {
    constexpr int VECTORS = SPANS * PARTS;
    vec acc[ROWS][VECTORS];
    RINGATTN_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      RINGATTN_UNROLL
      for (int x = 0; x < VECTORS; ++x) acc[i][x] = load(out + (r + i) * v_pitch + e + x * LANES) * decay[i];
    }
    for (int64_t j = 0; j < block.n; ++j) {
      RINGATTN_UNROLL
      for (int s = 0; s < SPANS; ++s) {
        __builtin_prefetch(next.v[j] + BYTES * (e + s * SPAN));
        vec value[PARTS];
        read(block.v[j], e + s * SPAN, n, value);
        RINGATTN_UNROLL
        for (int i = 0; i < ROWS; ++i) {
          const vec weight = broadcast(weights[j * ROWS + i]);
          RINGATTN_UNROLL
          for (int part = 0; part < PARTS; ++part) {
            acc[i][s * PARTS + part] = fma(value[part], weight, acc[i][s * PARTS + part]);
          }
        }
      }
    }
    RINGATTN_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      RINGATTN_UNROLL
      for (int x = 0; x < VECTORS; ++x) store(out + (r + i) * v_pitch + e + x * LANES, acc[i][x]);
    }
  }

  void end() {
    for (int64_t r = 0; r < rows; ++r) {
      float total = 0;
      for (int64_t x = 0; x < KEYS; ++x) total += sum[lane(r, x)];
      const float factor = total > 0 ? 1.0f / total : 0.0f;
      for (int64_t e = 0; e < p.v_dim; ++e) task.out[r * p.v_dim + e] = out[r * v_pitch + place(e)] * factor;
      task.lse[r] = total > 0 ? (top[lane(r, 0)] + __builtin_log2f(total)) * LN_2 : -INF;
    }
  }
};

// RowRange are computed by fours; one alone, by itself.
template <class Visit>
RINGATTN_INLINE auto with_decode(const DecodeParams& p, const Visit& visit) {
  auto by_rows = [&]<Dtype DTYPE>(std::integral_constant<Dtype, DTYPE>) {
    using One = Decode<DTYPE, 1>;
    using Four = Decode<DTYPE, 4>;
    return p.tokens * p.group() == 1 ? visit(static_cast<One*>(nullptr)) : visit(static_cast<Four*>(nullptr));
  };
  if (p.dtype == Dtype::float32) return by_rows(std::integral_constant<Dtype, Dtype::float32>{});
  if (p.dtype == Dtype::bfloat16) return by_rows(std::integral_constant<Dtype, Dtype::bfloat16>{});
  return by_rows(std::integral_constant<Dtype, Dtype::float16>{});
}

RINGATTN_INLINE int64_t decode_scratch(const DecodeParams& p) {
  return with_decode(p, [&]<class Kernel>(Kernel*) { return Kernel::scratch(p); });
}

RINGATTN_INLINE void decode(const DecodeParams& p, const DecodeTask& task, void* memory) {
  with_decode(p, [&]<class Kernel>(Kernel*) { Kernel(p, task, memory).run(); });
}

}  // namespace ringattn::RINGATTN_ISA
