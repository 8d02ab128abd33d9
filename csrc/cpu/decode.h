// Decoding: a few query rows of one kv head against keys that lie in pages.
//
// A vector's lanes are dims: keys and values are used as they lie in memory, each read once for all query rows of the
// head's group. Blocks of keys are small enough that scores stay in the nearest cache.
#pragma once
#include "arithmetic.h"

namespace ringattn::RINGATTN_ISA {

template <Dtype DTYPE>
RINGATTN_INLINE vec widen(const char* row, int64_t e, int64_t n) {
  if constexpr (DTYPE == Dtype::float32) {
    return load(reinterpret_cast<const float*>(row) + e, n);
  } else if constexpr (DTYPE == Dtype::bfloat16) {
    typedef uint16_t half_words __attribute__((vector_size(2 * W)));
    half_words x{};
    if (n == W) {
      std::memcpy(&x, row + 2 * e, sizeof x);
    } else {
      std::memcpy(&x, row + 2 * e, 2 * n);
    }
    return (vec)(__builtin_convertvector(x, uvec) << 16);
  } else {
    float x[W] = {};
    to_float32(x, row + 2 * e, DTYPE, n);
    return load(x);
  }
}

template <Dtype DTYPE>
struct Decode {
  static constexpr int64_t BLOCK_KEYS = 64, ROWS = 4, KEYS = W / ROWS, STRIP = 4;

  const DecodeProblem& p;
  const DecodeTask& task;
  const int64_t rows, rows_pad, pitch, v_pitch;
  float *q, *out, *top, *sum, *scores, *weights;
  const char *k_rows[BLOCK_KEYS], *v_rows[BLOCK_KEYS];
  int32_t positions[BLOCK_KEYS];

  static int64_t scratch(const DecodeProblem& p) {
    const int64_t rows = round_up(p.tokens * p.group(), ROWS);
    return 4 * (rows * (round_up(p.dim, W) + round_up(p.v_dim, W) + 2) + 2 * ROWS * BLOCK_KEYS) + 64 * 8;
  }

  Decode(const DecodeProblem& problem, const DecodeTask& t, void* memory)
      : p(problem), task(t), rows(p.tokens * p.group()), rows_pad(round_up(rows, ROWS)), pitch(round_up(p.dim, W)),
        v_pitch(round_up(p.v_dim, W)) {
    char* base = static_cast<char*>(memory);
    auto take = [&](int64_t floats) {
      float* piece = reinterpret_cast<float*>(base);
      base += round_up(4 * floats, 64);
      return piece;
    };
    q = take(rows_pad * pitch), out = take(rows_pad * v_pitch), top = take(rows_pad), sum = take(rows_pad);
    scores = take(ROWS * BLOCK_KEYS), weights = take(ROWS * BLOCK_KEYS);
  }

  void run() {
    std::memset(q, 0, 4 * rows_pad * pitch);
    std::memset(out, 0, 4 * rows_pad * v_pitch);
    for (int64_t r = 0; r < rows_pad; ++r) top[r] = -INFINITE, sum[r] = 0;
    for (int64_t r = 0; r < rows; ++r) {
      to_float32(q + r * pitch, row_of(p.q, DTYPE, task.batch, r / p.group(), task.kv_head * p.group() + r % p.group()),
                 DTYPE, p.dim);
    }
    int64_t n = 0;
    int32_t lowest = p.first[task.batch * p.tokens], highest = p.stop[task.batch * p.tokens];
    for (int64_t t = 1; t < p.tokens; ++t) {
      lowest = p.first[task.batch * p.tokens + t] < lowest ? p.first[task.batch * p.tokens + t] : lowest;
      highest = p.stop[task.batch * p.tokens + t] > highest ? p.stop[task.batch * p.tokens + t] : highest;
    }
    for (int64_t entry = task.first; entry < task.stop; ++entry) {
      for (int64_t slot = 0; slot < p.page_size; ++slot) {
        const int32_t position = p.slots[entry * p.page_size + slot];
        if (position < lowest || position >= highest) continue;
        k_rows[n] = row_of(p.k, DTYPE, p.pages[entry], slot, task.kv_head);
        v_rows[n] = row_of(p.v, DTYPE, p.pages[entry], slot, task.kv_head);
        positions[n] = position;
        if (++n == BLOCK_KEYS) attend(n), n = 0;
      }
    }
    if (n) attend(n);
    for (int64_t r = 0; r < rows; ++r) {
      float* to = task.out + r * p.v_dim;
      const float factor = sum[r] > 0 ? 1.0f / sum[r] : 0.0f;
      for (int64_t e = 0; e < p.v_dim; ++e) to[e] = out[r * v_pitch + e] * factor;
      task.lse[r] = sum[r] > 0 ? (top[r] + __builtin_log2f(sum[r])) * LN_2 : -INFINITE;
    }
  }

  void attend(int64_t n) {
    // What is left of the last vectors repeats the last key, at a position that nobody sees.
    const int64_t n_pad = round_up(n, W > KEYS ? W : KEYS);
    for (int64_t j = n; j < n_pad; ++j) k_rows[j] = k_rows[n - 1], positions[j] = -1;
    for (int64_t r = 0; r < rows; r += ROWS) {
      for (int64_t j = 0; j < n_pad; j += KEYS) dot(r, j);
      float decay[ROWS];
      for (int64_t i = 0; i < ROWS; ++i) decay[i] = softmax(r + i, i, n_pad);
      weigh(r, n, decay);
    }
  }

  // Scores of ROWS queries with KEYS keys: a vector of sums over lanes, a query and key each.
  void dot(int64_t r, int64_t j) {
    vec acc[W] = {};
    for (int64_t e = 0; e < p.dim; e += W) {
      const int64_t lanes = least(W, p.dim - e);
      vec k[KEYS];
      RINGATTN_UNROLL
      for (int x = 0; x < KEYS; ++x) k[x] = widen<DTYPE>(k_rows[j + x], e, lanes);
      RINGATTN_UNROLL
      for (int i = 0; i < ROWS; ++i) {
        const vec row = load(q + (r + i) * pitch + e);
        RINGATTN_UNROLL
        for (int x = 0; x < KEYS; ++x) acc[x * ROWS + i] = fma(k[x], row, acc[x * ROWS + i]);
      }
    }
    transpose(acc);
    RINGATTN_UNROLL
    for (int half = W / 2; half; half /= 2) {
      RINGATTN_UNROLL
      for (int i = 0; i < half; ++i) acc[i] = acc[i] + acc[i + half];
    }
    float found[W];
    store(found, acc[0]);
    RINGATTN_UNROLL
    for (int x = 0; x < KEYS; ++x) {
      RINGATTN_UNROLL
      for (int i = 0; i < ROWS; ++i) scores[i * BLOCK_KEYS + j + x] = found[x * ROWS + i];
    }
  }

  // Turns a row of scores into weights; returns what the row's sums so far are to be multiplied by.
  float softmax(int64_t r, int64_t i, int64_t n_pad) {
    float* s = scores + i * BLOCK_KEYS;
    float* w = weights + i * BLOCK_KEYS;
    if (r >= rows) {
      for (int64_t j = 0; j < n_pad; j += W) store(w + j, vec{});
      return 1.0f;
    }
    const int64_t row = task.batch * p.tokens + r / p.group();
    const ivec first = broadcast(p.first[row]), stop = broadcast(p.stop[row]);
    vec highest = broadcast(-INFINITE);
    for (int64_t j = 0; j < n_pad; j += W) {
      vec x = load(s + j);
      if (p.softcap != 0) {
        x = tanh(x * (p.scale / p.softcap)) * (p.softcap * LOG2_E);
      } else {
        x = x * (p.scale * LOG2_E);
      }
      ivec at;
      std::memcpy(&at, positions + j, sizeof at);
      x = select((at >= first) & (at < stop), x, broadcast(-INFINITE));
      store(s + j, x);
      highest = max(highest, x);
    }
    float most_now = top[r];
    for (int l = 0; l < W; ++l) most_now = highest[l] > most_now ? highest[l] : most_now;
    if (most_now == -INFINITE) {
      for (int64_t j = 0; j < n_pad; j += W) store(w + j, vec{});
      return 1.0f;
    }
    vec total{};
    for (int64_t j = 0; j < n_pad; j += W) {
      const vec x = load(s + j);
      const vec power = select(x > broadcast(-INFINITE), exp2(x - most_now), vec{});
      store(w + j, power);
      total = total + power;
    }
    const float decay = top[r] == -INFINITE ? 0.0f : exp2(broadcast(top[r] - most_now))[0];
    float added = 0;
    for (int l = 0; l < W; ++l) added += total[l];
    sum[r] = sum[r] * decay + added;
    top[r] = most_now;
    return decay;
  }

  void weigh(int64_t r, int64_t n, const float (&decay)[ROWS]) {
    for (int64_t e = 0; e < p.v_dim; e += STRIP * W) {
      if (e + STRIP * W <= p.v_dim) {
        weigh<STRIP>(r, n, e, W, decay);
      } else {
        for (int64_t f = e; f < p.v_dim; f += W) weigh<1>(r, n, f, least(W, p.v_dim - f), decay);
      }
    }
  }

  template <int VECTORS>
  void weigh(int64_t r, int64_t n, int64_t e, int64_t lanes, const float (&decay)[ROWS]) {
    vec acc[ROWS][VECTORS];
    RINGATTN_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      RINGATTN_UNROLL
      for (int x = 0; x < VECTORS; ++x) acc[i][x] = load(out + (r + i) * v_pitch + e + x * W) * decay[i];
    }
    for (int64_t j = 0; j < n; ++j) {
      vec v[VECTORS];
      RINGATTN_UNROLL
      for (int x = 0; x < VECTORS; ++x) v[x] = widen<DTYPE>(v_rows[j], e + x * W, lanes);
      RINGATTN_UNROLL
      for (int i = 0; i < ROWS; ++i) {
        const vec weight = broadcast(weights[i * BLOCK_KEYS + j]);
        RINGATTN_UNROLL
        for (int x = 0; x < VECTORS; ++x) acc[i][x] = fma(v[x], weight, acc[i][x]);
      }
    }
    RINGATTN_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      RINGATTN_UNROLL
      for (int x = 0; x < VECTORS; ++x) store(out + (r + i) * v_pitch + e + x * W, acc[i][x]);
    }
  }
};

RINGATTN_INLINE int64_t decode_scratch(const DecodeProblem& p) { return Decode<Dtype::float32>::scratch(p); }

RINGATTN_INLINE void decode(const DecodeProblem& p, const DecodeTask& task, void* memory) {
  if (p.dtype == Dtype::float32) {
    Decode<Dtype::float32>(p, task, memory).run();
  } else if (p.dtype == Dtype::bfloat16) {
    Decode<Dtype::bfloat16>(p, task, memory).run();
  } else {
    Decode<Dtype::float16>(p, task, memory).run();
  }
}

}  // namespace ringattn::RINGATTN_ISA
