// A vector of 32-bit lanes, as wide as the instruction set's registers, and its operations.
//
// The code uses the vector extensions of GCC and Clang, and intrinsics where the extensions lack an instruction that
// matters for speed. Each instruction set has its own namespace, and free functions have internal linkage, so that the
// linker cannot merge the code of two instruction sets.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(RINGATTN_X86)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns about the intrinsics' own undefined values: https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#define RINGATTN_INLINE static inline __attribute__((always_inline))
#define RINGATTN_UNROLL _Pragma("GCC unroll 32")

namespace ringattn::RINGATTN_ISA {

#if defined(RINGATTN_AVX512)
constexpr int LANES = 16;             // of a vector
constexpr int NUM_ACCUMULATORS = 24;  // vector registers that a microkernel accumulates in
#elif defined(RINGATTN_AVX2)
constexpr int LANES = 8;
constexpr int NUM_ACCUMULATORS = 12;
#else
constexpr int LANES = 4;
constexpr int NUM_ACCUMULATORS = 12;
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));

constexpr float INF = __builtin_inff();
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

RINGATTN_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
RINGATTN_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
RINGATTN_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

RINGATTN_INLINE vec load(const float* p) {
  vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
RINGATTN_INLINE void store(float* p, vec x) { std::memcpy(p, &x, sizeof x); }
// Loads and stores of the first n <= LANES lanes. n == LANES is a case of its own: a call of memcpy with a variable
// size costs more than the whole vector.
RINGATTN_INLINE vec load(const float* p, int64_t n) {
  if (n == LANES) return load(p);
  vec x{};
  std::memcpy(&x, p, n * sizeof(float));
  return x;
}
RINGATTN_INLINE void store(float* p, vec x, int64_t n) {
  if (n == LANES) {
    store(p, x);
  } else {
    std::memcpy(p, &x, n * sizeof(float));
  }
}
RINGATTN_INLINE vec broadcast(float x) { return x - vec{}; }  // x + vec{} would turn -0.0 into 0.0
RINGATTN_INLINE ivec broadcast(int32_t x) { return ivec{} + x; }
// mask ? a : b, lane by lane. Lanes of a mask are 0 or -1.
RINGATTN_INLINE vec select(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }

RINGATTN_INLINE vec fma(vec a, vec b, vec c) {
#if defined(RINGATTN_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(RINGATTN_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

RINGATTN_INLINE vec max(vec a, vec b) {
#if defined(RINGATTN_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(RINGATTN_AVX2)
  return _mm256_max_ps(a, b);
#else
  return select(a > b, a, b);
#endif
}

// min(x, 0), lane by lane. NaN stays NaN.
RINGATTN_INLINE vec min_zero(vec x) {
#if defined(RINGATTN_AVX512)
  return _mm512_min_ps(vec{}, x);
#elif defined(RINGATTN_AVX2)
  return _mm256_min_ps(vec{}, x);
#else
  return select(x > vec{}, vec{}, x);
#endif
}

RINGATTN_INLINE ivec lane_indices() {
  ivec x{};
  for (int i = 0; i < LANES; ++i) x[i] = i;
  return x;
}

// c[0] + c[1] x + c[2] x^2 + ..., by Horner's rule.
template <int N>
RINGATTN_INLINE vec polynomial(const float (&c)[N], vec x) {
  vec p = broadcast(c[N - 1]);
  RINGATTN_UNROLL
  for (int i = N - 2; i >= 0; --i) p = fma(p, x, broadcast(c[i]));
  return p;
}

// 2^x with a relative error of 1e-7. exp2(-inf) is 0 on AVX-512, and less than 1e-37 on other instruction sets. The
// power of the fraction is a minimax polynomial (Remez); the integer part then scales it by a power of two.
RINGATTN_INLINE vec exp2(vec x) {
#if defined(RINGATTN_AVX512)
  constexpr float c[] = {0.999999925064f,  0.693153073203f,   0.240153617021f,
                         0.0558263181162f, 0.00898934002358f, 0.00187757670002f};  // on [0, 1]
  const vec fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(polynomial(c, fraction), x);
#else
  constexpr float c[] = {1.00000007165f,   0.693146967065f,   0.24022119724f,
                         0.0555071327288f, 0.00967554133102f, 0.00132764721678f};  // on [-1/2, 1/2]
  // x + magic rounds x to an integer, and holds this integer in its lowest bits.
  constexpr float magic = 12582912.0f;
  x = max(x, broadcast(-125.0f));
  x = select(x > broadcast(127.0f), broadcast(127.0f), x);
  const vec sum = x + magic;
  const vec fraction = x - (sum - magic);
  return (vec)((uvec)polynomial(c, fraction) + ((uvec)sum << 23));
#endif
}

// tanh(x) with a relative error of 3e-7: the Taylor series near 0, and an exponential elsewhere.
RINGATTN_INLINE vec tanh(vec x) {
  const vec magnitude = (vec)((ivec)x & 0x7fffffff);
  constexpr float c[] = {1.0f, -0.333333333f, 0.133333333f, -0.0539682540f, 0.0218694885f, -0.00886323553f};
  const vec square = x * x;
  const vec near = x * polynomial(c, square);
  const vec decay = exp2(magnitude * (-2.0f * LOG2_E));
  const vec far = (1.0f - decay) / (1.0f + decay);
  const vec signed_far = (vec)((ivec)far | ((ivec)x & (int32_t)0x80000000));
  return select(magnitude < broadcast(0.3f), near, signed_far);
}

// Joins the low (HIGH: high) H lanes of each group of 2 H lanes of a and b: the half of a first, then the half of b.
template <int H, bool HIGH, int... K>
RINGATTN_INLINE vec combine_halves(vec a, vec b, std::integer_sequence<int, K...>) {
  return __builtin_shufflevector(a, b, (HIGH ? ((K & H) ? LANES + K : K + H) : ((K & H) ? LANES + K - H : K))...);
}

template <int H>
RINGATTN_INLINE void transpose_step(vec (&r)[LANES]) {
  using Lanes = std::make_integer_sequence<int, LANES>;
  RINGATTN_UNROLL
  for (int i = 0; i < LANES; ++i) {
    if (i & H) continue;
    const vec a = r[i], b = r[i + H];
    r[i] = combine_halves<H, false>(a, b, Lanes{});
    r[i + H] = combine_halves<H, true>(a, b, Lanes{});
  }
}

// Transposes a LANES x LANES matrix: first within 2 x 2 blocks, then within 4 x 4 blocks, and so on.
RINGATTN_INLINE void transpose(vec (&r)[LANES]) {
  transpose_step<1>(r);
  transpose_step<2>(r);
  if constexpr (LANES > 4) transpose_step<4>(r);
  if constexpr (LANES > 8) transpose_step<8>(r);
}

}  // namespace ringattn::RINGATTN_ISA
