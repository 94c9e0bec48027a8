// Sixteen float lanes on AVX-512 (F, BW, DQ, VL), for kernels_avx512.cpp, with BF16, and
// kernels_avx512_vnni.cpp, without. Same names as simd_avx2.h and simd_portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace duplex::DUPLEX_ISA {

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

#ifdef __AVX512BF16__

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

#else  // as on AVX2, to the bit

inline void store_bf16(std::uint16_t* p, F16 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
inline F16 lower(__m512i pairs) { return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))}; }
inline F16 upper(__m512i pairs) {
  return {_mm512_castsi512_ps(
      _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
inline F16 dot_pairs(F16 acc, const std::uint16_t* w, const std::uint16_t* x) {
  std::int32_t pair;
  __builtin_memcpy(&pair, x, sizeof pair);
  const __m512i weights = _mm512_loadu_si512(w), both = _mm512_set1_epi32(pair);
  return fma(upper(weights), upper(both), fma(lower(weights), lower(both), acc));
}

#endif

// Rows and vectors of 16 outputs that one tile keeps in registers.
inline constexpr int kTileRows = 6;
constexpr int tile_columns(int) { return 4; }

}  // namespace duplex::DUPLEX_ISA
