// Sixteen float lanes in plain C++, for any machine; compilers turn the loops into whatever
// vectors they have. See simd_avx512.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/types.h"

namespace duplex::portable {

struct F16 {
  float v[16];
};

template <class Op>
inline F16 lanes(Op op) {
  F16 out;
  for (int i = 0; i < 16; ++i) out.v[i] = op(i);
  return out;
}

inline F16 load(const float* p) {
  return lanes([p](int i) { return p[i]; });
}
inline void store(float* p, const F16& a) {
  for (int i = 0; i < 16; ++i) p[i] = a.v[i];
}
inline F16 set1(float x) {
  return lanes([x](int) { return x; });
}
inline F16 zero() { return set1(0.0f); }
inline F16 add(const F16& a, const F16& b) {
  return lanes([&](int i) { return a.v[i] + b.v[i]; });
}
inline F16 sub(const F16& a, const F16& b) {
  return lanes([&](int i) { return a.v[i] - b.v[i]; });
}
inline F16 mul(const F16& a, const F16& b) {
  return lanes([&](int i) { return a.v[i] * b.v[i]; });
}
inline F16 div(const F16& a, const F16& b) {
  return lanes([&](int i) { return a.v[i] / b.v[i]; });
}
inline F16 fma(const F16& a, const F16& b, const F16& c) {
  return lanes([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline F16 max(const F16& a, const F16& b) {
  return lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F16 min(const F16& a, const F16& b) {
  return lanes([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F16 round(const F16& a) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the sum has no fraction bits
  return lanes([&](int i) { return (a.v[i] + kMagic) - kMagic; });
}
inline F16 ldexp(const F16& a, const F16& n) {
  return lanes([&](int i) { return std::ldexp(a.v[i], static_cast<int>(n.v[i])); });
}
inline F16 select_range(const F16& a, const F16& b, int begin, int end) {
  return lanes([&](int i) { return i >= begin && i < end ? a.v[i] : b.v[i]; });
}
inline float reduce_add(F16 a) {
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  return a.v[0];
}
inline float reduce_max(const F16& a) {
  float best = a.v[0];
  for (int i = 1; i < 16; ++i) best = a.v[i] > best ? a.v[i] : best;
  return best;
}

inline F16 load_bf16(const std::uint16_t* p) {
  return lanes([p](int i) { return bf16_to_float(p[i]); });
}
inline void store_bf16(std::uint16_t* p, const F16& a) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_bf16(a.v[i]);
}

inline F16 dot_pairs(const F16& acc, const std::uint16_t* w, const std::uint16_t* x) {
  const float x0 = bf16_to_float(x[0]);
  const float x1 = bf16_to_float(x[1]);
  return lanes([&](int i) {
    return acc.v[i] + bf16_to_float(w[2 * i]) * x0 + bf16_to_float(w[2 * i + 1]) * x1;
  });
}

inline constexpr int kTileRows = 2;
constexpr int tile_columns(int) { return 1; }

}  // namespace duplex::portable
