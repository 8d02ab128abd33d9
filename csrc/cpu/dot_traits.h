// Dot product traits of the microkernels: fp32, or pairs of bf16 that are multiplied and summed in fp32.
//
// A trait works on matrices of 32-bit words, stored as floats. A word holds PACK_FACTOR elements, neighbours along the
// dim that a product sums over. There are two packed layouts of a matrix (rows, dim):
//
//   row-major: word (i, e) holds elements (i, PACK_FACTOR e ...), for products that sum over dim
//   VNNI:      word (i, e) holds elements (PACK_FACTOR i ..., e), for products that sum over rows
//
// With fp32 both are the matrix itself.
#pragma once
#include "row_access.h"

namespace ringattn::RINGATTN_ISA {

// One fp32 element per word. Takes every dtype.
struct Fp32Dot {
  static constexpr int PACK_FACTOR = 1;

  // sum + a * b, lane by lane.
  RINGATTN_INLINE vec dot(vec a, vec b, vec sum) { return fma(a, b, sum); }

  // Copies rows into the row-major layout. A row takes `pitch` words; the rest of each row, and rows from rows.n to
  // rows.n_pad, become zero.
  RINGATTN_INLINE void copy_rows(float* to, int64_t pitch, const RowRange& rows) {
    for (int64_t i = 0; i < rows.n; ++i) {
      if (i + 8 < rows.n) __builtin_prefetch(rows.row(i + 8));
      convert_to_fp32(to + i * pitch, rows.row(i), rows.dtype, rows.dim);
      for (int64_t e = rows.dim; e < pitch; ++e) to[i * pitch + e] = 0;
    }
    for (int64_t i = rows.n * pitch; i < rows.n_pad * pitch; ++i) to[i] = 0;
  }

  // The same for the VNNI layout.
  RINGATTN_INLINE void copy_rows_vnni(float* to, int64_t pitch, const RowRange& rows) { copy_rows(to, pitch, rows); }

  // Store LANES elements of two neighbouring rows of a computed fp32 matrix, in either layout.
  RINGATTN_INLINE void store_rows(float* to, int64_t pitch, vec even, vec odd) {
    store(to, even);
    store(to + pitch, odd);
  }
  RINGATTN_INLINE void store_rows_vnni(float* to, int64_t pitch, vec even, vec odd) {
    store_rows(to, pitch, even, odd);
  }
};

#if defined(RINGATTN_BF16)
// Two bf16 elements per word, for the instruction vdpbf16ps. Takes bfloat16 only. For the functions see Fp32Dot.
struct Bf16PairDot {
  static constexpr int PACK_FACTOR = 2;

#if defined(RINGATTN_BF16_EMULATED)
  // Ordinary instructions, so that tests can run on any machine.
  RINGATTN_INLINE vec low_half(vec x) { return (vec)((uvec)x << 16); }
  RINGATTN_INLINE vec high_half(vec x) { return (vec)((uvec)x & 0xffff0000u); }
  RINGATTN_INLINE vec dot(vec a, vec b, vec sum) {
    return fma(high_half(a), high_half(b), fma(low_half(a), low_half(b), sum));
  }
  RINGATTN_INLINE uvec round_to_bf16(vec x) { return ((uvec)x + 0x7fffu + (((uvec)x >> 16) & 1u)) >> 16; }
  RINGATTN_INLINE vec interleave_bf16(vec even, vec odd) {
    return (vec)(round_to_bf16(even) | round_to_bf16(odd) << 16);
  }
  RINGATTN_INLINE void store_bf16(float* to, vec x) {
    const uvec bits = round_to_bf16(x);
    uint16_t halves[LANES];
    for (int i = 0; i < LANES; ++i) halves[i] = (uint16_t)bits[i];
    std::memcpy(to, halves, sizeof halves);
  }
#else
  RINGATTN_INLINE vec dot(vec a, vec b, vec sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
  RINGATTN_INLINE vec interleave_bf16(vec even, vec odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (vec)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
  }
  RINGATTN_INLINE void store_bf16(float* to, vec x) {
    const __m256bh halves = _mm512_cvtneps_pbh(x);
    std::memcpy(to, &halves, sizeof halves);
  }
#endif

  RINGATTN_INLINE void copy_rows(float* to, int64_t pitch, const RowRange& rows) {
    for (int64_t i = 0; i < rows.n; ++i) {
      char* row = reinterpret_cast<char*>(to + i * pitch);
      std::memcpy(row, rows.row(i), rows.dim * 2);
      std::memset(row + rows.dim * 2, 0, pitch * 4 - rows.dim * 2);
    }
    std::memset(to + rows.n * pitch, 0, (rows.n_pad - rows.n) * pitch * 4);
  }

  RINGATTN_INLINE void copy_rows_vnni(float* to, int64_t pitch, const RowRange& rows) {
    for (int64_t i = 0; i < rows.n_pad; i += 2) {
      float* row = to + i / 2 * pitch;
      int64_t e = 0;
      if (i + 1 < rows.n) {
        const uint16_t* a = static_cast<const uint16_t*>(rows.row(i));
        const uint16_t* b = static_cast<const uint16_t*>(rows.row(i + 1));
        for (; e < rows.dim; ++e) row[e] = as_float(a[e] | (uint32_t)b[e] << 16);
      } else if (i < rows.n) {
        const uint16_t* a = static_cast<const uint16_t*>(rows.row(i));
        for (; e < rows.dim; ++e) row[e] = as_float(a[e]);
      }
      for (; e < pitch; ++e) row[e] = 0;
    }
  }

  RINGATTN_INLINE void store_rows(float* to, int64_t pitch, vec even, vec odd) {
    store_bf16(to, even);
    store_bf16(to + pitch, odd);
  }
  RINGATTN_INLINE void store_rows_vnni(float* to, int64_t, vec even, vec odd) { store(to, interleave_bf16(even, odd)); }
};
#endif

}  // namespace ringattn::RINGATTN_ISA
