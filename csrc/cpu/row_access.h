// Reading rows of strided tensors: addresses, prefetches, and conversion to fp32.
#pragma once
#include "params.h"
#include "vec.h"

namespace ringattn::RINGATTN_ISA {

constexpr int64_t CACHE_LINE = 64;  // bytes

RINGATTN_INLINE int64_t element_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

template <class Pointer>
RINGATTN_INLINE const char* row_ptr(const TensorView<Pointer>& x, Dtype dtype, int64_t batch, int64_t row,
                                    int64_t head) {
  const int64_t offset = batch * x.batch + row * x.row + head * x.head;
  return static_cast<const char*>(static_cast<const void*>(x.data)) + offset * element_size(dtype);
}

// Prefetches `dim` elements of a row into the second-level cache.
template <class Pointer>
RINGATTN_INLINE void prefetch_row(const TensorView<Pointer>& x, Dtype dtype, int64_t batch, int64_t row, int64_t head,
                                  int64_t dim) {
  const char* first = row_ptr(x, dtype, batch, row, head);
  for (int64_t byte = 0; byte < dim * element_size(dtype); byte += CACHE_LINE) __builtin_prefetch(first + byte, 0, 2);
}

// Rows [first, first + n) of one head, to be copied into n_pad rows. `dim` is the number of elements of a row.
struct RowRange {
  const InputView& x;
  Dtype dtype;
  int64_t batch, head, first, n, n_pad, dim;
  const void* row(int64_t i) const { return row_ptr(x, dtype, batch, first + i, head); }
};

RINGATTN_INLINE float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

RINGATTN_INLINE void fp32_to_fp32(float* to, const float* x, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, load(x + i));
  if (i < n) store(to + i, load(x + i, n - i), n - i);
}

RINGATTN_INLINE void bf16_to_fp32(float* to, const uint16_t* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = as_float((uint32_t)x[i] << 16);
}

RINGATTN_INLINE void fp16_to_fp32(float* to, const uint16_t* x, int64_t n) {
  int64_t i = 0;
#if defined(RINGATTN_X86) && (defined(RINGATTN_AVX512) || defined(RINGATTN_AVX2))
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  }
#endif
  for (; i < n; ++i) {
    // Exponent and fraction move to their place in fp32. The product with 2^112 corrects the exponent's bias, and
    // normalises subnormals.
    const uint32_t magnitude = (uint32_t)(x[i] & 0x7fff) << 13;
    const uint32_t special = (x[i] & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;  // infinity or NaN
    const float scaled = as_float(magnitude) * 0x1p112f;
    uint32_t bits;
    std::memcpy(&bits, &scaled, sizeof bits);
    to[i] = as_float((special ? (special | magnitude) : bits) | (uint32_t)(x[i] & 0x8000) << 16);
  }
}

RINGATTN_INLINE void convert_to_fp32(float* to, const void* from, Dtype dtype, int64_t n) {
  if (dtype == Dtype::float32) {
    fp32_to_fp32(to, static_cast<const float*>(from), n);
  } else if (dtype == Dtype::bfloat16) {
    bf16_to_fp32(to, static_cast<const uint16_t*>(from), n);
  } else {
    fp16_to_fp32(to, static_cast<const uint16_t*>(from), n);
  }
}

}  // namespace ringattn::RINGATTN_ISA
