// Sixteen float lanes on AVX-512 (F, BW, DQ, VL, BF16). Same names as simd_avx2.h and
// simd_portable.h; included by exactly one kernels_<isa>.cpp.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace duplex::avx512 {

struct F16 {
  __m512 v;
};

inline F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
inline F16 set1(float x) { return {_mm512_set1_ps(x)}; }
inline F16 zero() { return {_mm512_setzero_ps()}; }
inline F16 add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 sub(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F16 round(F16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n for integral n
inline F16 ldexp(F16 a, F16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// lanes i with begin <= i < end keep a, the others take b
inline F16 select_range(F16 a, F16 b, int begin, int end) {
  const unsigned mask = ((1u << end) - 1u) & ~((1u << begin) - 1u);
  return {_mm512_mask_mov_ps(b.v, static_cast<__mmask16>(mask), a.v)};
}
inline float reduce_add(F16 a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(F16 a) { return _mm512_reduce_max_ps(a.v); }

inline F16 load_bf16(const std::uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline void store_bf16(std::uint16_t* p, F16 a) {
  const __m256bh bits = _mm512_cvtneps_pbh(a.v);
  __builtin_memcpy(p, &bits, sizeof bits);
}

// acc[i] += w[2i] * x[0] + w[2i + 1] * x[1], w and x in bfloat16
inline F16 dot_pairs(F16 acc, const std::uint16_t* w, const std::uint16_t* x) {
  std::int32_t pair;
  __builtin_memcpy(&pair, x, sizeof pair);
  const __m512i weights = _mm512_loadu_si512(w);
  return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(weights),
                           reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)))};
}

// ---- integers: sixteen int32 sums of products of codes
// note: lanes of int, not __m512i, whose 64-bit lanes make gcc move every sum on every step.
struct I16 {
  using Lanes [[gnu::vector_size(64)]] = std::int32_t;
  Lanes v;
};
inline I16 as_lanes(__m512i v) { return {reinterpret_cast<I16::Lanes>(v)}; }
using Bytes = __m512i;  // 16 outputs x 4 codes
struct Nibbles {
  Bytes low, high;
};
inline I16 splat(std::int32_t x) { return as_lanes(_mm512_set1_epi32(x)); }
inline F16 to_float(I16 a) { return {_mm512_cvtepi32_ps(reinterpret_cast<__m512i>(a.v))}; }
// Panel codes stay as they are stored, unsigned; the correction takes off what was added to them.
inline I16 start_bytes(std::int32_t correction) { return splat(correction); }
inline Bytes load_bytes(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
inline Nibbles load_nibbles(const std::uint8_t* p) {
  const __m512i both = _mm512_loadu_si512(p);
  const __m512i mask = _mm512_set1_epi8(15);
  return {_mm512_and_si512(both, mask), _mm512_and_si512(_mm512_srli_epi16(both, 4), mask)};
}
// acc[i] += sum over j < 4 of w[4 i + j] * x[j]
inline I16 dot_bytes(I16 acc, Bytes w, const std::int8_t* x) {
  std::int32_t quad;
  __builtin_memcpy(&quad, x, sizeof quad);
  return as_lanes(
      _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(acc.v), w, _mm512_set1_epi32(quad)));
}
inline I16 dot_nibbles(I16 acc, Bytes w, const std::int8_t* x) { return dot_bytes(acc, w, x); }
// Sixteen integral lanes in [-127, 127] as bytes; returns their sum.
inline std::int32_t store_codes(std::int8_t* p, F16 a) {
  const __m512i codes = _mm512_cvtps_epi32(a.v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(codes));
  return _mm512_reduce_add_epi32(codes);
}

// Rows and vectors of 16 outputs that one tile keeps in registers.
inline constexpr int kTileRows = 6;
constexpr int tile_columns(int) { return 4; }
inline constexpr const char* kName = "avx512";

}  // namespace duplex::avx512
