// Sixteen float lanes as two AVX2 registers (AVX2, FMA), for kernels_avx2.cpp and
// kernels_avx2_vnni.cpp. See simd_avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace duplex::DUPLEX_ISA {

struct F16 {
  __m256 lo, hi;
};

inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline F16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F16 add(F16 a, F16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F16 sub(F16 a, F16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F16 mul(F16 a, F16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F16 div(F16 a, F16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F16 fma(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F16 max(F16 a, F16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F16 min(F16 a, F16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F16 round(F16 a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kMode), _mm256_round_ps(a.hi, kMode)};
}
inline __m256 ldexp_half(__m256 a, __m256 n) {
  // n may reach -150: two factors keep every intermediate a normal number.
  const __m256i exponent = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(exponent, 1);
  const __m256i rest = _mm256_sub_epi32(exponent, half);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 f1 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 f2 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(a, f1), f2);
}
inline F16 ldexp(F16 a, F16 n) { return {ldexp_half(a.lo, n.lo), ldexp_half(a.hi, n.hi)}; }
inline __m256 range_mask(int begin, int end, int first) {
  const __m256i lane =
      _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(first));
  return _mm256_castsi256_ps(
      _mm256_and_si256(_mm256_cmpgt_epi32(lane, _mm256_set1_epi32(begin - 1)),
                       _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane)));
}
inline F16 select_range(F16 a, F16 b, int begin, int end) {
  return {_mm256_blendv_ps(b.lo, a.lo, range_mask(begin, end, 0)),
          _mm256_blendv_ps(b.hi, a.hi, range_mask(begin, end, 8))};
}
inline float reduce_add(F16 a) {
  const __m256 s = _mm256_add_ps(a.lo, a.hi);
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
}
inline float reduce_max(F16 a) {
  const __m256 s = _mm256_max_ps(a.lo, a.hi);
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_shuffle_ps(h, h, 1)));
}

inline __m256 widen(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline F16 load_bf16(const std::uint16_t* p) {
  return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline __m256i rounded_bits(__m256 a) {  // round to nearest even, result in the upper halves
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd),
                           16);
}
inline void store_bf16(std::uint16_t* p, F16 a) {
  const __m256i packed = _mm256_packus_epi32(rounded_bits(a.lo), rounded_bits(a.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

inline __m256 dot_half(__m256 acc, __m256i weights, __m256 x0, __m256 x1) {
  const __m256 w0 = _mm256_castsi256_ps(_mm256_slli_epi32(weights, 16));
  const __m256 w1 = _mm256_castsi256_ps(
      _mm256_and_si256(weights, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  return _mm256_fmadd_ps(w1, x1, _mm256_fmadd_ps(w0, x0, acc));
}
inline F16 dot_pairs(F16 acc, const std::uint16_t* w, const std::uint16_t* x) {
  std::uint32_t pair;
  __builtin_memcpy(&pair, x, sizeof pair);
  const __m256i both = _mm256_set1_epi32(static_cast<int>(pair));
  const __m256 x0 = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
  const __m256 x1 =
      _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  const auto* p = reinterpret_cast<const __m256i*>(w);
  return {dot_half(acc.lo, _mm256_loadu_si256(p), x0, x1),
          dot_half(acc.hi, _mm256_loadu_si256(p + 1), x0, x1)};
}

inline constexpr int kTileRows = 6;
constexpr int tile_columns(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

}  // namespace duplex::DUPLEX_ISA
