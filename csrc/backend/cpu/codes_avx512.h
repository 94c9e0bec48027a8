// Sixteen int32 sums of products of int8 and int4 codes on AVX-512 (VNNI). Same names as
// codes_avx2.h and codes_portable.h.
#pragma once

#include <cstdint>

#include "backend/cpu/simd_avx512.h"

namespace duplex::DUPLEX_ISA {

// note: lanes of int, not __m512i, whose 64-bit lanes make gcc move every sum on every step.
struct I16 {
  using Lanes [[gnu::vector_size(64)]] = std::int32_t;
  Lanes v;
};
inline I16 as_lanes(__m512i v) { return {reinterpret_cast<I16::Lanes>(v)}; }
using Bytes = __m512i;  // 16 outputs x 4 codes
inline I16 splat(std::int32_t x) { return as_lanes(_mm512_set1_epi32(x)); }
inline F16 to_float(I16 a) { return {_mm512_cvtepi32_ps(reinterpret_cast<__m512i>(a.v))}; }
// Panel codes stay as they are stored, unsigned; the correction takes off what was added to them.
inline I16 start_bytes(std::int32_t correction) { return splat(correction); }
inline Bytes load_bytes(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
// The lower (0) or upper (1) four bits of each byte.
template <int kHalf>
inline Bytes load_nibbles(const std::uint8_t* p) {
  const __m512i both = _mm512_loadu_si512(p);
  return _mm512_and_si512(kHalf == 0 ? both : _mm512_srli_epi16(both, 4), _mm512_set1_epi8(15));
}
// acc[i] += sum over j < 4 of w[4 i + j] * x[j]
inline I16 dot_bytes(I16 acc, Bytes w, const std::int8_t* x) {
  std::int32_t quad;
  __builtin_memcpy(&quad, x, sizeof quad);
  return as_lanes(
      _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(acc.v), w, _mm512_set1_epi32(quad)));
}
inline I16 dot_nibbles(I16 acc, Bytes w, const std::int8_t* x) { return dot_bytes(acc, w, x); }
// The same for signed codes that meet unsigned ones: values of a tape and their weights.
using SignedBytes = __m512i;
inline SignedBytes load_signed(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
inline I16 dot_signed(I16 acc, SignedBytes w, const std::uint8_t* x) {
  std::int32_t quad;
  __builtin_memcpy(&quad, x, sizeof quad);
  return as_lanes(
      _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(acc.v), _mm512_set1_epi32(quad), w));
}
inline I16 load_lanes(const std::int32_t* p) { return as_lanes(_mm512_loadu_si512(p)); }
inline void store_lanes(std::int32_t* p, I16 a) {
  _mm512_storeu_si512(p, reinterpret_cast<__m512i>(a.v));
}
// Sixteen lanes to the nearest integers; store_codes keeps the low byte of each.
inline I16 to_codes(F16 a) { return as_lanes(_mm512_cvtps_epi32(a.v)); }
inline void store_codes(void* p, I16 codes) {
  _mm_storeu_si128(static_cast<__m128i*>(p),
                   _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(codes.v)));
}
inline I16 add(I16 a, I16 b) { return {a.v + b.v}; }
inline std::int32_t reduce_add(I16 a) {
  return _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(a.v));
}

}  // namespace duplex::DUPLEX_ISA
