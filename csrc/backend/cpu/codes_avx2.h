// Sixteen int32 sums of products of int8 and int4 codes on AVX2, for kernels_avx2.cpp and, where
// four products and their sum are one instruction (AVX-VNNI), kernels_avx2_vnni.cpp: the sums are
// exact, so both give the same bits. See codes_avx512.h.
#pragma once

#include <cstdint>

#include "backend/cpu/simd_avx2.h"

namespace duplex::DUPLEX_ISA {

// note: lanes of int, as in codes_avx512.h.
struct I16 {
  using Lanes [[gnu::vector_size(32)]] = std::int32_t;
  Lanes lo, hi;
};
inline I16 as_lanes(__m256i lo, __m256i hi) {
  return {reinterpret_cast<I16::Lanes>(lo), reinterpret_cast<I16::Lanes>(hi)};
}
inline __m256i as_vector(I16::Lanes v) { return reinterpret_cast<__m256i>(v); }
struct Bytes {  // 16 outputs x 4 codes
  __m256i lo, hi;
};
inline I16 splat(std::int32_t x) { return as_lanes(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
inline F16 to_float(I16 a) {
  return {_mm256_cvtepi32_ps(as_vector(a.lo)), _mm256_cvtepi32_ps(as_vector(a.hi))};
}
inline Bytes load_raw(const std::uint8_t* p) {
  const auto* v = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)};
}
template <int kHalf>
inline Bytes load_nibbles(const std::uint8_t* p) {
  const Bytes both = load_raw(p);
  const auto half = [](__m256i v) {
    return _mm256_and_si256(kHalf == 0 ? v : _mm256_srli_epi16(v, 4), _mm256_set1_epi8(15));
  };
  return {half(both.lo), half(both.hi)};
}
inline __m256i broadcast_quad(const void* x) {
  std::int32_t quad;
  __builtin_memcpy(&quad, x, sizeof quad);
  return _mm256_set1_epi32(quad);
}

#ifdef __AVXVNNI__

// Panel codes stay as they are stored, unsigned; the correction takes off what was added to them.
inline I16 start_bytes(std::int32_t correction) { return splat(correction); }
inline Bytes load_bytes(const std::uint8_t* p) { return load_raw(p); }
inline I16 dot_bytes(I16 acc, Bytes w, const std::int8_t* x) {
  const __m256i quad = broadcast_quad(x);
  return as_lanes(_mm256_dpbusd_avx_epi32(as_vector(acc.lo), w.lo, quad),
                  _mm256_dpbusd_avx_epi32(as_vector(acc.hi), w.hi, quad));
}
inline I16 dot_nibbles(I16 acc, Bytes w, const std::int8_t* x) { return dot_bytes(acc, w, x); }
using SignedBytes = Bytes;
inline SignedBytes load_signed(const std::uint8_t* p) { return load_raw(p); }
inline I16 dot_signed(I16 acc, const SignedBytes& w, const std::uint8_t* x) {
  const __m256i quad = broadcast_quad(x);
  return as_lanes(_mm256_dpbusd_avx_epi32(as_vector(acc.lo), quad, w.lo),
                  _mm256_dpbusd_avx_epi32(as_vector(acc.hi), quad, w.hi));
}

#else

// int8 codes become signed on loading, so there is nothing to correct.
inline I16 start_bytes(std::int32_t) { return splat(0); }
inline Bytes load_bytes(const std::uint8_t* p) {
  const Bytes raw = load_raw(p);
  const __m256i flip = _mm256_set1_epi8(-128);
  return {_mm256_xor_si256(raw.lo, flip), _mm256_xor_si256(raw.hi, flip)};
}
// w unsigned; pairs of products stay below 2^15 where both are at most 127.
inline __m256i dot_half(__m256i acc, __m256i w, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(w, x);
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline I16 dot_bytes(I16 acc, Bytes w, const std::int8_t* x) {
  // The signs of x move to w, whose codes are signed.
  const __m256i quad = broadcast_quad(x);
  const __m256i magnitude = _mm256_abs_epi8(quad);
  return as_lanes(dot_half(as_vector(acc.lo), magnitude, _mm256_sign_epi8(w.lo, quad)),
                  dot_half(as_vector(acc.hi), magnitude, _mm256_sign_epi8(w.hi, quad)));
}
inline I16 dot_nibbles(I16 acc, Bytes w, const std::int8_t* x) {
  const __m256i quad = broadcast_quad(x);
  return as_lanes(dot_half(as_vector(acc.lo), w.lo, quad), dot_half(as_vector(acc.hi), w.hi, quad));
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
  const __m256i quad = broadcast_quad(x);
  const __m256i even = _mm256_and_si256(quad, _mm256_set1_epi16(0x00ff));
  const __m256i odd = _mm256_srli_epi16(quad, 8);
  const auto half = [&](__m256i sum, __m256i w_even, __m256i w_odd) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w_even, even));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(w_odd, odd));
  };
  return as_lanes(half(as_vector(acc.lo), w.even.lo, w.odd.lo),
                  half(as_vector(acc.hi), w.even.hi, w.odd.hi));
}

#endif

inline I16 load_lanes(const std::int32_t* p) {
  const auto* v = reinterpret_cast<const __m256i*>(p);
  return as_lanes(_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1));
}
inline void store_lanes(std::int32_t* p, I16 a) {
  auto* v = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(v, as_vector(a.lo));
  _mm256_storeu_si256(v + 1, as_vector(a.hi));
}
inline I16 to_codes(F16 a) { return as_lanes(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)); }
inline void store_codes(void* p, I16 codes) {
  const __m256i low_bytes =
      _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                       0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1);
  const auto eight = [&](I16::Lanes v) {
    const __m256i bytes = _mm256_shuffle_epi8(as_vector(v), low_bytes);
    return _mm_or_si128(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  };
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm_unpacklo_epi64(eight(codes.lo), eight(codes.hi)));
}
inline I16 add(I16 a, I16 b) { return {a.lo + b.lo, a.hi + b.hi}; }
inline std::int32_t reduce_add(I16 a) {
  alignas(32) std::int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), as_vector(a.lo + a.hi));
  std::int32_t sum = 0;
  for (const std::int32_t lane : lanes) sum += lane;
  return sum;
}

}  // namespace duplex::DUPLEX_ISA
