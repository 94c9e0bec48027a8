// Sixteen int32 sums of products of int8 and int4 codes on AVX2. See codes_avx512.h.
#pragma once

#include <cstdint>

#include "backend/cpu/simd_avx2.h"

namespace duplex::avx2 {

struct I16 {
  __m256i lo, hi;
};
struct Bytes {  // 16 outputs x 4 codes
  __m256i lo, hi;
};
inline I16 splat(std::int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline F16 to_float(I16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
// int8 codes become signed on loading, so there is nothing to correct.
inline I16 start_bytes(std::int32_t) { return splat(0); }
inline Bytes load_raw(const std::uint8_t* p) {
  const auto* v = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)};
}
inline Bytes load_bytes(const std::uint8_t* p) {
  const Bytes raw = load_raw(p);
  const __m256i flip = _mm256_set1_epi8(-128);
  return {_mm256_xor_si256(raw.lo, flip), _mm256_xor_si256(raw.hi, flip)};
}
template <int kHalf>
inline Bytes load_nibbles(const std::uint8_t* p) {
  const Bytes both = load_raw(p);
  const auto half = [](__m256i v) {
    return _mm256_and_si256(kHalf == 0 ? v : _mm256_srli_epi16(v, 4), _mm256_set1_epi8(15));
  };
  return {half(both.lo), half(both.hi)};
}
inline __m256i broadcast_quad(const std::int8_t* x) {
  std::int32_t quad;
  __builtin_memcpy(&quad, x, sizeof quad);
  return _mm256_set1_epi32(quad);
}
// w unsigned; pairs of products stay below 2^15 for |x| <= 127 and w <= 127.
inline __m256i dot_half(__m256i acc, __m256i w, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(w, x);
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline I16 dot_bytes(I16 acc, Bytes w, const std::int8_t* x) {
  // The signs of x move to w, whose codes are signed.
  const __m256i quad = broadcast_quad(x);
  const __m256i magnitude = _mm256_abs_epi8(quad);
  const auto half = [&](__m256i sum, __m256i codes) {
    const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(codes, quad));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  };
  return {half(acc.lo, w.lo), half(acc.hi, w.hi)};
}
inline I16 dot_nibbles(I16 acc, Bytes w, const std::int8_t* x) {
  const __m256i quad = broadcast_quad(x);
  return {dot_half(acc.lo, w.lo, quad), dot_half(acc.hi, w.hi, quad)};
}
// Signed codes, the even and the odd ones widened to 16 bits: 255 * 127 twice does not fit them.
struct SignedBytes {
  Bytes even, odd;
};
inline SignedBytes load_signed(const std::uint8_t* p) {
  const Bytes raw = load_raw(p);
  const auto even = [](__m256i v) { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8); };
  return {{even(raw.lo), even(raw.hi)},
          {_mm256_srai_epi16(raw.lo, 8), _mm256_srai_epi16(raw.hi, 8)}};
}
inline I16 dot_signed(I16 acc, const SignedBytes& w, const std::uint8_t* x) {
  std::int32_t quad;
  __builtin_memcpy(&quad, x, sizeof quad);
  const __m256i even = _mm256_set1_epi32(quad & 0x00ff00ff);
  const __m256i odd = _mm256_srli_epi16(_mm256_set1_epi32(quad), 8);
  const auto half = [&](__m256i sum, __m256i w_even, __m256i w_odd) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w_even, even));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(w_odd, odd));
  };
  return {half(acc.lo, w.even.lo, w.odd.lo), half(acc.hi, w.even.hi, w.odd.hi)};
}
inline I16 load_lanes(const std::int32_t* p) {
  const auto* v = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)};
}
inline void store_lanes(std::int32_t* p, I16 a) {
  auto* v = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(v, a.lo);
  _mm256_storeu_si256(v + 1, a.hi);
}
inline I16 to_codes(F16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline void store_codes(void* p, I16 codes) {
  std::int32_t lanes[16];
  store_lanes(lanes, codes);
  for (int i = 0; i < 16; ++i)
    static_cast<std::uint8_t*>(p)[i] = static_cast<std::uint8_t>(lanes[i]);
}
inline I16 add(I16 a, I16 b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline std::int32_t reduce_add(I16 a) {
  alignas(32) std::int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_add_epi32(a.lo, a.hi));
  std::int32_t sum = 0;
  for (const std::int32_t lane : lanes) sum += lane;
  return sum;
}

}  // namespace duplex::avx2
