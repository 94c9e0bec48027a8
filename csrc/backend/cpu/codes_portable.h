// Sixteen int32 sums of products of int8 and int4 codes in plain C++. See codes_avx512.h.
#pragma once

#include <cstdint>

#include "backend/cpu/simd_portable.h"

namespace duplex::portable {

struct I16 {
  std::int32_t v[16];
};
struct Bytes {  // 16 outputs x 4 codes, as they are stored
  std::uint8_t v[64];
};
inline I16 splat(std::int32_t x) {
  I16 out;
  for (std::int32_t& lane : out.v) lane = x;
  return out;
}
inline F16 to_float(const I16& a) {
  return lanes([&](int i) { return static_cast<float>(a.v[i]); });
}
inline I16 start_bytes(std::int32_t correction) { return splat(correction); }
inline Bytes load_bytes(const std::uint8_t* p) {
  Bytes out;
  __builtin_memcpy(out.v, p, sizeof out.v);
  return out;
}
template <int kHalf>
inline Bytes load_nibbles(const std::uint8_t* p) {
  Bytes out;
  for (int i = 0; i < 64; ++i) out.v[i] = kHalf == 0 ? p[i] & 15 : p[i] >> 4;
  return out;
}
inline I16 dot_bytes(I16 acc, const Bytes& w, const std::int8_t* x) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) acc.v[i] += std::int32_t{w.v[4 * i + j]} * x[j];
  return acc;
}
inline I16 dot_nibbles(const I16& acc, const Bytes& w, const std::int8_t* x) {
  return dot_bytes(acc, w, x);
}
using SignedBytes = Bytes;
inline SignedBytes load_signed(const std::uint8_t* p) { return load_bytes(p); }
inline I16 dot_signed(I16 acc, const SignedBytes& w, const std::uint8_t* x) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j)
      acc.v[i] += std::int32_t{static_cast<std::int8_t>(w.v[4 * i + j])} * x[j];
  return acc;
}
inline I16 load_lanes(const std::int32_t* p) {
  I16 out;
  __builtin_memcpy(out.v, p, sizeof out.v);
  return out;
}
inline void store_lanes(std::int32_t* p, const I16& a) { __builtin_memcpy(p, a.v, sizeof a.v); }
inline I16 to_codes(const F16& a) {
  I16 codes;
  const F16 rounded = round(a);
  for (int i = 0; i < 16; ++i) codes.v[i] = static_cast<std::int32_t>(rounded.v[i]);
  return codes;
}
inline void store_codes(void* p, const I16& codes) {
  for (int i = 0; i < 16; ++i)
    static_cast<std::uint8_t*>(p)[i] = static_cast<std::uint8_t>(codes.v[i]);
}
inline I16 add(I16 a, const I16& b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
inline std::int32_t reduce_add(const I16& a) {
  std::int32_t sum = 0;
  for (const std::int32_t lane : a.v) sum += lane;
  return sum;
}

}  // namespace duplex::portable
