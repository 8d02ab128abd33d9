// How products are computed: in fp32, or in pairs of bfloat16 that are multiplied and summed up in fp32.
//
// Both work on words of 32 bits, an element or a pair of them, so that everything else is written once. A product
// runs over words; `PACK_FACTOR` elements of the summed-over dim lie in each.
#pragma once
#include "params.h"
#include "vec.h"

namespace ringattn::RINGATTN_ISA {

RINGATTN_INLINE float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

RINGATTN_INLINE void convert_to_fp32(float* to, const void* from, Dtype dtype, int64_t n) {
  if (dtype == Dtype::float32) {
    const float* x = static_cast<const float*>(from);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(to + i, load(x + i));
    if (i < n) store(to + i, load(x + i, n - i), n - i);
  } else if (dtype == Dtype::bfloat16) {
    const uint16_t* x = static_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < n; ++i) to[i] = as_float((uint32_t)x[i] << 16);
  } else {
    const uint16_t* x = static_cast<const uint16_t*>(from);
    int64_t i = 0;
#if defined(RINGATTN_X86) && (defined(RINGATTN_AVX512) || defined(RINGATTN_AVX2))
    for (; i + 8 <= n; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
    }
#endif
    for (; i < n; ++i) {
      // Half to single: shift the fields into place, then let a product set the exponent right, subnormals too.
      const uint32_t magnitude = (uint32_t)(x[i] & 0x7fff) << 13;
      const uint32_t special = (x[i] & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
      const float scaled = as_float(magnitude) * 0x1p112f;
      uint32_t bits;
      std::memcpy(&bits, &scaled, sizeof bits);
      to[i] = as_float((special ? (special | magnitude) : bits) | (uint32_t)(x[i] & 0x8000) << 16);
    }
  }
}

constexpr int64_t CACHE_LINE = 64;  // bytes that memory gives at once

RINGATTN_INLINE int64_t element_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

template <class Pointer>
RINGATTN_INLINE const char* row_ptr(const TensorView<Pointer>& x, Dtype dtype, int64_t batch, int64_t row,
                                    int64_t head) {
  const int64_t offset = batch * x.batch + row * x.row + head * x.head;
  return static_cast<const char*>(static_cast<const void*>(x.data)) + offset * element_size(dtype);
}

// Asks memory for a row that is needed soon.
template <class Pointer>
RINGATTN_INLINE void prefetch_row(const TensorView<Pointer>& x, Dtype dtype, int64_t batch, int64_t row, int64_t head,
                                  int64_t dim) {
  const char* first = row_ptr(x, dtype, batch, row, head);
  for (int64_t byte = 0; byte < dim * element_size(dtype); byte += CACHE_LINE) __builtin_prefetch(first + byte, 0, 2);
}

// RowRange [first, first + n) of one head. Copies go to rows of `pitch` words; what n and dim leave there, up to
// `n_pad` rows, becomes zero.
struct RowRange {
  const InputView& x;
  Dtype dtype;
  int64_t batch, head, first, n, n_pad, dim;
  const void* at(int64_t i) const { return row_ptr(x, dtype, batch, first + i, head); }
};

// Elements as fp32. Takes every dtype.
struct Fp32Dot {
  static constexpr int PACK_FACTOR = 1;

  RINGATTN_INLINE vec dot(vec a, vec b, vec sum) { return fma(a, b, sum); }

  // A word holds an element of a row.
  RINGATTN_INLINE void copy_rows(float* to, int64_t pitch, const RowRange& rows) {
    for (int64_t i = 0; i < rows.n; ++i) {
      if (i + 8 < rows.n) __builtin_prefetch(rows.at(i + 8));
      convert_to_fp32(to + i * pitch, rows.at(i), rows.dtype, rows.dim);
      for (int64_t e = rows.dim; e < pitch; ++e) to[i * pitch + e] = 0;
    }
    for (int64_t i = rows.n * pitch; i < rows.n_pad * pitch; ++i) to[i] = 0;
  }

  // A word holds the elements of PACK_FACTOR rows, one above the other.
  RINGATTN_INLINE void copy_rows_vnni(float* to, int64_t pitch, const RowRange& rows) { copy_rows(to, pitch, rows); }

  // Two rows of a computed matrix, to be summed over along the row, and to be summed over across rows.
  RINGATTN_INLINE void store_rows(float* to, int64_t pitch, vec even, vec odd) {
    store(to, even);
    store(to + pitch, odd);
  }
  RINGATTN_INLINE void store_rows_vnni(float* to, int64_t pitch, vec even, vec odd) {
    store_rows(to, pitch, even, odd);
  }
};

#if defined(RINGATTN_BF16)
// Bf16PairDot of bfloat16, for the instruction that multiplies and sums up pairs. Takes bfloat16 only.
struct Bf16PairDot {
  static constexpr int PACK_FACTOR = 2;

#if defined(RINGATTN_BF16_EMULATED)
  // The same in ordinary instructions: for tests on machines without that one.
  RINGATTN_INLINE vec low(vec x) { return (vec)((uvec)x << 16); }
  RINGATTN_INLINE vec high(vec x) { return (vec)((uvec)x & 0xffff0000u); }
  RINGATTN_INLINE vec dot(vec a, vec b, vec sum) { return fma(high(a), high(b), fma(low(a), low(b), sum)); }
  RINGATTN_INLINE uvec rounded(vec x) { return ((uvec)x + 0x7fffu + (((uvec)x >> 16) & 1u)) >> 16; }
  RINGATTN_INLINE vec pair(vec even, vec odd) { return (vec)(rounded(even) | rounded(odd) << 16); }
  RINGATTN_INLINE void store_bf16(float* to, vec x) {
    const uvec bits = rounded(x);
    uint16_t halves[LANES];
    for (int i = 0; i < LANES; ++i) halves[i] = (uint16_t)bits[i];
    std::memcpy(to, halves, sizeof halves);
  }
#else
  RINGATTN_INLINE vec dot(vec a, vec b, vec sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
  RINGATTN_INLINE vec pair(vec even, vec odd) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (vec)_mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
  }
  RINGATTN_INLINE void store_bf16(float* to, vec x) {
    const __m256bh halves = _mm512_cvtneps_pbh(x);
    std::memcpy(to, &halves, sizeof halves);
  }
#endif

  RINGATTN_INLINE void copy_rows(float* to, int64_t pitch, const RowRange& rows) {
    for (int64_t i = 0; i < rows.n; ++i) {
      char* row = reinterpret_cast<char*>(to + i * pitch);
      std::memcpy(row, rows.at(i), rows.dim * 2);
      std::memset(row + rows.dim * 2, 0, pitch * 4 - rows.dim * 2);
    }
    std::memset(to + rows.n * pitch, 0, (rows.n_pad - rows.n) * pitch * 4);
  }

  RINGATTN_INLINE void copy_rows_vnni(float* to, int64_t pitch, const RowRange& rows) {
    for (int64_t i = 0; i < rows.n_pad; i += 2) {
      float* row = to + i / 2 * pitch;
      int64_t e = 0;
      if (i + 1 < rows.n) {
        const uint16_t *a = static_cast<const uint16_t*>(rows.at(i)), *b = static_cast<const uint16_t*>(rows.at(i + 1));
        for (; e < rows.dim; ++e) row[e] = as_float(a[e] | (uint32_t)b[e] << 16);
      } else if (i < rows.n) {
        const uint16_t* a = static_cast<const uint16_t*>(rows.at(i));
        for (; e < rows.dim; ++e) row[e] = as_float(a[e]);
      }
      for (; e < pitch; ++e) row[e] = 0;
    }
  }

  RINGATTN_INLINE void store_rows(float* to, int64_t pitch, vec even, vec odd) {
    store_bf16(to, even);
    store_bf16(to + pitch, odd);
  }
  RINGATTN_INLINE void store_rows_vnni(float* to, int64_t, vec even, vec odd) { store(to, pair(even, odd)); }
};
#endif

}  // namespace ringattn::RINGATTN_ISA
