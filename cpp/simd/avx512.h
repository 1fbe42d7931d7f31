// AVX-512 F/BW/DQ/VL. Only intrinsics and our own code in here: a std:: template emitted from this file would be
// compiled with AVX-512 and might be picked by the linker for every CPU.
#pragma once
#include <immintrin.h>

#include "../kernels.h"
#include "transpose_lanes.h"

namespace sparseprop::avx512 {

struct F32 {
  using scalar = float;
  static constexpr int width = 16;
  static constexpr int registers = 32;
  __m512 v;

  // Stops the compiler from loading the same memory once per use.
  static F32 in_register(F32 x) {
    asm("" : "+v"(x.v));
    return x;
  }
  static F32 zero() { return {_mm512_setzero_ps()}; }
  static F32 broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static F32 load(const float* p) { return {_mm512_load_ps(p)}; }
  static F32 loadu(const float* p) { return {_mm512_loadu_ps(p)}; }
  static F32 loadu(const bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  void store(float* p) const { _mm512_store_ps(p, v); }
  void storeu(float* p) const { _mm512_storeu_ps(p, v); }
  void stream(float* p) const { _mm512_stream_ps(p, v); }  // aligned, past the caches
  static void fence() { _mm_sfence(); }  // streamed before, seen by whoever reads later
  // Round to nearest even; NaN stays NaN (its quiet bit is set before truncation).
  void storeu(bf16* p) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i fixed = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(fixed, 16)));
  }
  static __mmask16 first(ptrdiff_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static F32 load_some(const float* p, ptrdiff_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static F32 load_some(const bf16* p, ptrdiff_t n) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  void store_some(float* p, ptrdiff_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  void store_some(bf16* p, ptrdiff_t n) const {
    alignas(32) bf16 all[16];
    storeu(all);
    _mm256_mask_storeu_epi16(p, first(n), _mm256_load_si256(reinterpret_cast<const __m256i*>(all)));
  }
  template <class In>
  static F32 load_even(const In* p) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return {_mm512_permutex2var_ps(loadu(p).v, even, loadu(p + 16).v)};
  }
  static void zip(F32 a, F32 b, F32& low, F32& high) {
    const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    low.v = _mm512_permutex2var_ps(a.v, first, b.v);
    high.v = _mm512_permutex2var_ps(a.v, _mm512_add_epi32(first, _mm512_set1_epi32(8)), b.v);
  }
  // NaN stays NaN, and lets gradients pass, as in torch.
  static F32 relu(F32 x) { return {_mm512_max_ps(_mm512_setzero_ps(), x.v)}; }
  static F32 min(F32 cap, F32 x) { return {_mm512_min_ps(cap.v, x.v)}; }
  static F32 where_positive(F32 x, F32 g) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_NLE_UQ), g.v)};
  }
  static F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is not a number
  static F32 round(F32 x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  // x * 2^n for whole n from -126 to 127
  static F32 times_power(F32 x, F32 n) { return {_mm512_scalef_ps(x.v, n.v)}; }
  float largest() const { return _mm512_reduce_max_ps(v); }
  // x with lanes from n on zero
  static F32 keep_some(F32 x, ptrdiff_t n) { return n < width ? F32{_mm512_maskz_mov_ps(first(n), x.v)} : x; }
  // best and best_at become value and at in lanes where the value is larger, or not a number: torch's rule for pooling
  static void take_larger(F32 value, F32 at, F32& best, F32& best_at) {
    const __mmask16 larger = _mm512_cmp_ps_mask(value.v, best.v, _CMP_GT_OQ);
    const __mmask16 wins = larger | _mm512_cmp_ps_mask(value.v, value.v, _CMP_UNORD_Q);
    best.v = _mm512_mask_mov_ps(best.v, wins, value.v);
    best_at.v = _mm512_mask_mov_ps(best_at.v, wins, at.v);
  }
  // Lanes that are whole numbers up to 255, as bytes.
  void store_bytes(uint8_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(v)));
  }
  static F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
  static F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  float sum() const { return _mm512_reduce_add_ps(v); }

  // Lanes of set bits hold the first lanes of x one after the other, the others 0; and back.
  static F32 expand(F32 x, unsigned bits) { return {_mm512_maskz_expand_ps(static_cast<__mmask16>(bits), x.v)}; }
  static F32 compress(F32 x, unsigned bits) { return {_mm512_maskz_compress_ps(static_cast<__mmask16>(bits), x.v)}; }
  // a * b + c in lanes of set bits, elsewhere c, whatever b is.
  using Lanes = __mmask16;
  static Lanes lanes(unsigned bits) { return static_cast<__mmask16>(bits); }
  static F32 fma_in(Lanes some, F32 a, F32 b, F32 c) { return {_mm512_mask3_fmadd_ps(a.v, b.v, c.v, some)}; }

  // Four horizontal sums in two steps, so that a kernel can start other work between them: partial sums of a, b, c, d side
  // by side, then the first `n` sums written, or added, to dots.
  static F32 fold4(F32 a, F32 b, F32 c, F32 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
    return {_mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee))};
  }
  template <int n>
  static void finish4(F32 folded, float* dots, bool accumulate) {
    constexpr __mmask8 some = (1 << n) - 1;
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(folded.v), _mm512_extractf32x8_ps(folded.v, 1));
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    if (accumulate) sum = _mm_add_ps(sum, n == 4 ? _mm_loadu_ps(dots) : _mm_maskz_loadu_ps(some, dots));
    n == 4 ? _mm_storeu_ps(dots, sum) : _mm_mask_storeu_ps(dots, some, sum);
  }

  static void transpose(F32 (&x)[width]) {
    __m512 r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
      t[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
// r[4g + k] holds columns k, k+4, k+8, k+12 (one per 128-bit quarter) of rows 4g .. 4g+3
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const __m512 low01 = _mm512_shuffle_f32x4(r[k], r[4 + k], 0x88), high01 = _mm512_shuffle_f32x4(r[k], r[4 + k], 0xdd);
      const __m512 low23 = _mm512_shuffle_f32x4(r[8 + k], r[12 + k], 0x88),
                   high23 = _mm512_shuffle_f32x4(r[8 + k], r[12 + k], 0xdd);
      x[k].v = _mm512_shuffle_f32x4(low01, low23, 0x88);
      x[k + 4].v = _mm512_shuffle_f32x4(high01, high23, 0x88);
      x[k + 8].v = _mm512_shuffle_f32x4(low01, low23, 0xdd);
      x[k + 12].v = _mm512_shuffle_f32x4(high01, high23, 0xdd);
    }
  }
};

struct F64 {
  using scalar = double;
  static constexpr int width = 8;
  static constexpr int registers = 32;
  __m512d v;

  static F64 in_register(F64 x) { return x; }
  static F64 zero() { return {_mm512_setzero_pd()}; }
  static F64 broadcast(double x) { return {_mm512_set1_pd(x)}; }
  static F64 load(const double* p) { return {_mm512_load_pd(p)}; }
  static F64 loadu(const double* p) { return {_mm512_loadu_pd(p)}; }
  void store(double* p) const { _mm512_store_pd(p, v); }
  void storeu(double* p) const { _mm512_storeu_pd(p, v); }
  void stream(double* p) const { _mm512_stream_pd(p, v); }  // aligned, past the caches
  static void fence() { _mm_sfence(); }  // streamed before, seen by whoever reads later
  static __mmask8 first(ptrdiff_t n) { return static_cast<__mmask8>((1u << n) - 1u); }
  static F64 load_some(const double* p, ptrdiff_t n) { return {_mm512_maskz_loadu_pd(first(n), p)}; }
  void store_some(double* p, ptrdiff_t n) const { _mm512_mask_storeu_pd(p, first(n), v); }
  static F64 load_even(const double* p) {
    return {_mm512_set_pd(p[14], p[12], p[10], p[8], p[6], p[4], p[2], p[0])};
  }
  static void zip(F64 a, F64 b, F64& low, F64& high) {
    const __m512i first = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0);
    low.v = _mm512_permutex2var_pd(a.v, first, b.v);
    high.v = _mm512_permutex2var_pd(a.v, _mm512_add_epi64(first, _mm512_set1_epi64(4)), b.v);
  }
  // NaN stays NaN, and lets gradients pass, as in torch.
  static F64 relu(F64 x) { return {_mm512_max_pd(_mm512_setzero_pd(), x.v)}; }
  static F64 min(F64 cap, F64 x) { return {_mm512_min_pd(cap.v, x.v)}; }
  static F64 max(F64 a, F64 b) { return {_mm512_max_pd(a.v, b.v)}; }
  static F64 where_positive(F64 x, F64 g) {
    return {_mm512_maskz_mov_pd(_mm512_cmp_pd_mask(x.v, _mm512_setzero_pd(), _CMP_NLE_UQ), g.v)};
  }
  static F64 keep_some(F64 x, ptrdiff_t n) { return n < width ? F64{_mm512_maskz_mov_pd(first(n), x.v)} : x; }
  static void take_larger(F64 value, F64 at, F64& best, F64& best_at) {
    const __mmask8 larger = _mm512_cmp_pd_mask(value.v, best.v, _CMP_GT_OQ);
    const __mmask8 wins = larger | _mm512_cmp_pd_mask(value.v, value.v, _CMP_UNORD_Q);
    best.v = _mm512_mask_mov_pd(best.v, wins, value.v);
    best_at.v = _mm512_mask_mov_pd(best_at.v, wins, at.v);
  }
  void store_bytes(uint8_t* p) const {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm256_cvtepi32_epi8(_mm512_cvttpd_epi32(v)));
  }
  static F64 add(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
  static F64 mul(F64 a, F64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
  static F64 fma(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  double sum() const { return _mm512_reduce_add_pd(v); }
  static F64 expand(F64 x, unsigned bits) { return {_mm512_maskz_expand_pd(static_cast<__mmask8>(bits), x.v)}; }
  static F64 compress(F64 x, unsigned bits) { return {_mm512_maskz_compress_pd(static_cast<__mmask8>(bits), x.v)}; }
  using Lanes = __mmask8;
  static Lanes lanes(unsigned bits) { return static_cast<__mmask8>(bits); }
  static F64 fma_in(Lanes some, F64 a, F64 b, F64 c) { return {_mm512_mask3_fmadd_pd(a.v, b.v, c.v, some)}; }
  static F64 fold4(F64 a, F64 b, F64 c, F64 d) {
    const __m512d ab = _mm512_add_pd(_mm512_unpacklo_pd(a.v, b.v), _mm512_unpackhi_pd(a.v, b.v));
    const __m512d cd = _mm512_add_pd(_mm512_unpacklo_pd(c.v, d.v), _mm512_unpackhi_pd(c.v, d.v));
    return {_mm512_add_pd(_mm512_shuffle_f64x2(ab, cd, 0x44), _mm512_shuffle_f64x2(ab, cd, 0xee))};
  }
  template <int n>
  static void finish4(F64 folded, double* dots, bool accumulate) {
    constexpr __mmask8 some = (1 << n) - 1;
    const __m256d ab = _mm512_castpd512_pd256(folded.v), cd = _mm512_extractf64x4_pd(folded.v, 1);
    __m256d sum = _mm256_add_pd(_mm256_permute2f128_pd(ab, cd, 0x20), _mm256_permute2f128_pd(ab, cd, 0x31));
    if (accumulate) sum = _mm256_add_pd(sum, _mm256_maskz_loadu_pd(some, dots));
    _mm256_mask_storeu_pd(dots, some, sum);
  }
  static void transpose(F64 (&x)[width]) { transpose_lanes(x); }
};

}  // namespace sparseprop::avx512
