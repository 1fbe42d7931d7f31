// AVX2 + FMA. Only intrinsics and our own code in here: a std:: template emitted from this file would be compiled
// with AVX2 and might be picked by the linker for every CPU.
#pragma once
#include <immintrin.h>

#include "bits.h"
#include "convert.h"
#include "transpose_lanes.h"

namespace sparseprop::avx2 {

// The first n 32-bit lanes.
static inline __m256i first_lanes(ptrdiff_t n) {
  const __m256i index = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), index);
}

struct F32 {
  using scalar = float;
  static constexpr int width = 8;
  static constexpr int registers = 16;
  __m256 v;

  // Stops the compiler from loading the same memory once per use.
  static F32 in_register(F32 x) {
    asm("" : "+x"(x.v));
    return x;
  }
  static F32 zero() { return {_mm256_setzero_ps()}; }
  static F32 broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static F32 load(const float* p) { return {_mm256_load_ps(p)}; }
  static F32 loadu(const float* p) { return {_mm256_loadu_ps(p)}; }
  static F32 loadu(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  void store(float* p) const { _mm256_store_ps(p, v); }
  void storeu(float* p) const { _mm256_storeu_ps(p, v); }
  void stream(float* p) const { _mm256_stream_ps(p, v); }  // aligned, past the caches
  static void fence() { _mm_sfence(); }  // streamed before, seen by whoever reads later
  // Round to nearest even; NaN stays NaN (its quiet bit is set before truncation).
  void storeu(bf16* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  static F32 load_some(const float* p, ptrdiff_t n) { return {_mm256_maskload_ps(p, first_lanes(n))}; }
  static F32 load_some(const bf16* p, ptrdiff_t n) {
    alignas(32) float all[8] = {};
    for (ptrdiff_t i = 0; i < n; ++i) all[i] = To<float>::from(p[i]);
    return load(all);
  }
  void store_some(float* p, ptrdiff_t n) const { _mm256_maskstore_ps(p, first_lanes(n), v); }
  void store_some(bf16* p, ptrdiff_t n) const {
    alignas(16) bf16 all[8];
    storeu(all);
    for (ptrdiff_t i = 0; i < n; ++i) p[i] = all[i];
  }
  template <class In>
  static F32 load_even(const In* p) {
    const __m256 pairs = _mm256_shuffle_ps(loadu(p).v, loadu(p + 8).v, 0x88);  // 0 2 8 10 | 4 6 12 14
    return {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(pairs), 0xd8))};
  }
  static void zip(F32 a, F32 b, F32& low, F32& high) {
    const __m256 even = _mm256_unpacklo_ps(a.v, b.v), odd = _mm256_unpackhi_ps(a.v, b.v);
    low.v = _mm256_permute2f128_ps(even, odd, 0x20);
    high.v = _mm256_permute2f128_ps(even, odd, 0x31);
  }
  // NaN stays NaN, and lets gradients pass, as in torch.
  static F32 relu(F32 x) { return {_mm256_max_ps(_mm256_setzero_ps(), x.v)}; }
  static F32 min(F32 cap, F32 x) { return {_mm256_min_ps(cap.v, x.v)}; }
  static F32 where_positive(F32 x, F32 g) {
    return {_mm256_and_ps(_mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_NLE_UQ), g.v)};
  }
  static F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
  static F32 round(F32 x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  static F32 times_power(F32 x, F32 n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
    return {_mm256_mul_ps(x.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
  }
  float largest() const {
    const __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
  }
  static F32 keep_some(F32 x, ptrdiff_t n) { return {_mm256_and_ps(_mm256_castsi256_ps(first_lanes(n)), x.v)}; }
  // See avx512.h.
  static void take_larger(F32 value, F32 at, F32& best, F32& best_at) {
    const __m256 larger = _mm256_cmp_ps(value.v, best.v, _CMP_GT_OQ);
    const __m256 wins = _mm256_or_ps(larger, _mm256_cmp_ps(value.v, value.v, _CMP_UNORD_Q));
    best.v = _mm256_blendv_ps(best.v, value.v, wins);
    best_at.v = _mm256_blendv_ps(best_at.v, at.v, wins);
  }
  void store_bytes(uint8_t* p) const {
    const __m256i whole = _mm256_cvttps_epi32(v);
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(half, half));
  }
  static F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
  static F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  float sum() const {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }
  static __m256i places(const uint8_t* from) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  }
  static F32 pick(F32 x, const uint8_t* from) {
    const __m256i lane = places(from);
    return {_mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(lane, 31)), _mm256_permutevar8x32_ps(x.v, lane))};
  }
  using Lanes = __m256i;
  static Lanes lanes(unsigned bits) { return _mm256_cmpgt_epi32(places(kBitTables.expand[bits]), _mm256_set1_epi32(-1)); }
  static F32 fma_in(Lanes some, F32 a, F32 b, F32 c) { return fma(a, {_mm256_and_ps(_mm256_castsi256_ps(some), b.v)}, c); }
  static F32 expand(F32 x, unsigned bits) { return pick(x, kBitTables.expand[bits]); }
  static F32 compress(F32 x, unsigned bits) { return pick(x, kBitTables.compress[bits]); }
  // Four horizontal sums in two steps, see avx512.h.
  static F32 fold4(F32 a, F32 b, F32 c, F32 d) {
    return {_mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v))};
  }
  template <int n>
  static void finish4(F32 folded, float* dots, bool accumulate) {
    const __m128i some = _mm_set_epi32(-(n > 3), -(n > 2), -(n > 1), -1);
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(folded.v), _mm256_extractf128_ps(folded.v, 1));
    if (accumulate) sum = _mm_add_ps(sum, n == 4 ? _mm_loadu_ps(dots) : _mm_maskload_ps(dots, some));
    n == 4 ? _mm_storeu_ps(dots, sum) : _mm_maskstore_ps(dots, some, sum);
  }
  static void transpose(F32 (&x)[width]) {
    __m256 r[8], t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(x[i].v, x[i + 1].v);
      t[i + 1] = _mm256_unpackhi_ps(x[i].v, x[i + 1].v);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      x[i].v = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
      x[i + 4].v = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
  }
};

struct F64 {
  using scalar = double;
  static constexpr int width = 4;
  static constexpr int registers = 16;
  __m256d v;

  static F64 in_register(F64 x) { return x; }
  static F64 zero() { return {_mm256_setzero_pd()}; }
  static F64 broadcast(double x) { return {_mm256_set1_pd(x)}; }
  static F64 load(const double* p) { return {_mm256_load_pd(p)}; }
  static F64 loadu(const double* p) { return {_mm256_loadu_pd(p)}; }
  void store(double* p) const { _mm256_store_pd(p, v); }
  void storeu(double* p) const { _mm256_storeu_pd(p, v); }
  void stream(double* p) const { _mm256_stream_pd(p, v); }  // aligned, past the caches
  static void fence() { _mm_sfence(); }  // streamed before, seen by whoever reads later
  static __m256i first(ptrdiff_t n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_set_epi64x(3, 2, 1, 0));
  }
  static F64 load_some(const double* p, ptrdiff_t n) { return {_mm256_maskload_pd(p, first(n))}; }
  void store_some(double* p, ptrdiff_t n) const { _mm256_maskstore_pd(p, first(n), v); }
  static F64 load_even(const double* p) { return {_mm256_set_pd(p[6], p[4], p[2], p[0])}; }
  static void zip(F64 a, F64 b, F64& low, F64& high) {
    const __m256d even = _mm256_unpacklo_pd(a.v, b.v), odd = _mm256_unpackhi_pd(a.v, b.v);
    low.v = _mm256_permute2f128_pd(even, odd, 0x20);
    high.v = _mm256_permute2f128_pd(even, odd, 0x31);
  }
  // NaN stays NaN, and lets gradients pass, as in torch.
  static F64 relu(F64 x) { return {_mm256_max_pd(_mm256_setzero_pd(), x.v)}; }
  static F64 min(F64 cap, F64 x) { return {_mm256_min_pd(cap.v, x.v)}; }
  static F64 max(F64 a, F64 b) { return {_mm256_max_pd(a.v, b.v)}; }
  static F64 where_positive(F64 x, F64 g) {
    return {_mm256_and_pd(_mm256_cmp_pd(x.v, _mm256_setzero_pd(), _CMP_NLE_UQ), g.v)};
  }
  static F64 keep_some(F64 x, ptrdiff_t n) { return {_mm256_and_pd(_mm256_castsi256_pd(first(n)), x.v)}; }
  static void take_larger(F64 value, F64 at, F64& best, F64& best_at) {
    const __m256d larger = _mm256_cmp_pd(value.v, best.v, _CMP_GT_OQ);
    const __m256d wins = _mm256_or_pd(larger, _mm256_cmp_pd(value.v, value.v, _CMP_UNORD_Q));
    best.v = _mm256_blendv_pd(best.v, value.v, wins);
    best_at.v = _mm256_blendv_pd(best_at.v, at.v, wins);
  }
  void store_bytes(uint8_t* p) const {
    const __m128i whole = _mm256_cvttpd_epi32(v), half = _mm_packs_epi32(whole, whole);
    _mm_storeu_si32(p, _mm_packus_epi16(half, half));
  }
  static F64 add(F64 a, F64 b) { return {_mm256_add_pd(a.v, b.v)}; }
  static F64 mul(F64 a, F64 b) { return {_mm256_mul_pd(a.v, b.v)}; }
  static F64 fma(F64 a, F64 b, F64 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  double sum() const {
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
  }
  static F64 pick(F64 x, const uint8_t* from) {
    alignas(32) double in[4], out[4];
    x.store(in);
    for (int i = 0; i < 4; ++i) out[i] = from[i] < 4 ? in[from[i]] : 0.0;
    return load(out);
  }
  using Lanes = unsigned;
  static Lanes lanes(unsigned bits) { return bits; }
  static F64 fma_in(Lanes some, F64 a, F64 b, F64 c) { return fma(a, expand(compress(b, some), some), c); }
  static F64 expand(F64 x, unsigned bits) { return pick(x, kBitTables.expand[bits]); }
  static F64 compress(F64 x, unsigned bits) { return pick(x, kBitTables.compress[bits]); }
  static F64 fold4(F64 a, F64 b, F64 c, F64 d) {
    const __m256d ab = _mm256_hadd_pd(a.v, b.v), cd = _mm256_hadd_pd(c.v, d.v);
    return {_mm256_add_pd(_mm256_permute2f128_pd(ab, cd, 0x20), _mm256_permute2f128_pd(ab, cd, 0x31))};
  }
  template <int n>
  static void finish4(F64 folded, double* dots, bool accumulate) {
    (accumulate ? add(folded, load_some(dots, n)) : folded).store_some(dots, n);
  }
  static void transpose(F64 (&x)[width]) { transpose_lanes(x); }
};

}  // namespace sparseprop::avx2
