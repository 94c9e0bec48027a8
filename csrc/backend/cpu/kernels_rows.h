// The operations that need nothing but their own row: norms, activations and embeddings. Included
// by kernels_<isa>.cpp; see kernels_gemm.h.
#pragma once

#include <cmath>

#include "backend/cpu/kernels.h"

namespace duplex::DUPLEX_ISA {

inline constexpr float kLog2e = 1.44269504088896341f;

// exp(x) for x <= 0 to about one unit in the last place; never below exp(-87.3), a normal number.
inline F16 exp_nonpositive(F16 x) {
  const F16 floor = set1(-87.3f);
  const F16 clamped = max(x, floor);
  const F16 n = round(mul(clamped, set1(kLog2e)));
  F16 r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  F16 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(mul(r, r), p, r), set1(1.0f));
  return ldexp(p, n);
}

// 2^t for t < 128 to 2e-5 of it: enough for a weight that is stored in 8 bits.
inline F16 exp2_of_bf16(F16 t) {
  t = max(t, set1(-126.0f));
  const F16 n = round(t);
  const F16 f = sub(t, n);
  F16 p = set1(9.666373953e-3f);
  p = fma(p, f, set1(5.583834276e-2f));
  p = fma(p, f, set1(0.24022348225f));
  p = fma(p, f, set1(0.69313675165f));
  return ldexp(fma(p, f, set1(1.0f)), n);
}

// silu(x) = x * sigmoid(x), by exp(-|x|) so that nothing overflows.
inline F16 silu(F16 x) {
  const F16 magnitude = max(x, sub(zero(), x));
  const F16 e = exp_nonpositive(sub(zero(), magnitude));
  const F16 one = set1(1.0f);
  const F16 denominator = add(one, e);
  // x >= 0: 1 / (1 + e); x < 0: e / (1 + e). The sign picks the numerator without a branch:
  // max(x, 0) / (1 + e) + min(x, 0) * e / (1 + e).
  const F16 positive = div(max(x, zero()), denominator);
  return fma(min(x, zero()), div(e, denominator), positive);
}

inline void write_row(const Rows& out, std::int64_t row, std::int64_t column, F16 value) {
  const std::int64_t at = row * out.stride + column;
  if (out.dtype == DType::kF32)
    store(static_cast<float*>(out.data) + at, value);
  else
    store_bf16(static_cast<std::uint16_t*>(out.data) + at, value);
}

// 1 / sqrt(mean(x^2) + eps); padding is zero and adds nothing.
inline float inverse_rms(const float* x, std::int64_t n_padded, std::int64_t width, float eps) {
  F16 sum = zero();
  for (std::int64_t i = 0; i < n_padded; i += 16) {
    const F16 v = load(x + i);
    sum = fma(v, v, sum);
  }
  return 1.0f / std::sqrt(reduce_add(sum) / static_cast<float>(width) + eps);
}

inline void norm_in_place(float* x, const float* weight, float eps, std::int64_t width) {
  const std::int64_t n = round_up(width, kColumnAlign);
  const F16 scale = set1(inverse_rms(x, n, width, eps));
  for (std::int64_t i = 0; i < n; i += 16)
    store(x + i, mul(mul(load(x + i), scale), load(weight + i)));
}

inline void norm_row(const NormArgs& args, std::int32_t row) {
  const float* x = args.x + row * args.x_stride;
  const std::int64_t n = round_up(args.width, kColumnAlign);
  const F16 scale = set1(inverse_rms(x, n, args.width, args.eps));
  for (std::int64_t i = 0; i < n; i += 16) {
    F16 v = mul(mul(load(x + i), scale), load(args.weight + i));
    if (args.activation == Activation::kGelu) {
      float lanes[16];
      store(lanes, v);
      for (float& lane : lanes) lane = 0.5f * lane * (1.0f + std::erf(lane * 0.70710678118654752f));
      v = load(lanes);
    }
    write_row(args.out, row, i, v);
  }
}

inline void to_float(const void* x, DType dtype, std::int64_t n_padded, float* out) {
  for (std::int64_t i = 0; i < n_padded; i += 16)
    store(out + i, dtype == DType::kF32 ? load(static_cast<const float*>(x) + i)
                                        : load_bf16(static_cast<const std::uint16_t*>(x) + i));
}

inline void add_scaled(float* y, const float* x, float weight, std::int64_t n_padded) {
  const F16 scale = set1(weight);
  for (std::int64_t i = 0; i < n_padded; i += 16)
    store(y + i, fma(load(x + i), scale, load(y + i)));
}

// Tables are stored with rows of padded width.
inline const std::byte* table_row(const void* table, DType dtype, std::int64_t row,
                                  std::int64_t width_padded) {
  return static_cast<const std::byte*>(table) +
         static_cast<std::size_t>(row * width_padded) * dtype_bytes(dtype);
}

inline void embed_text_row(const EmbedTextArgs& args, std::int32_t row) {
  const std::int64_t n = round_up(args.d_model, kColumnAlign);
  float* out = args.out_row(row);
  to_float(table_row(args.table, args.table_dtype, args.ids[row], n), args.table_dtype, n, out);
  norm_in_place(out, args.norm, args.eps, args.d_model);
}

inline void embed_audio_row(const EmbedAudioArgs& args, std::int32_t row) {
  const std::int64_t n = round_up(args.d_model, kColumnAlign);
  float* out = args.out_row(row);
  const std::uint8_t* bins = args.bins + std::int64_t{row} * args.n_mels;
  for (std::int64_t i = 0; i < n; i += 16) {
    F16 sum = zero();
    for (std::int32_t mel = 0; mel < args.n_mels; ++mel) {
      const std::byte* entry =
          table_row(args.table, args.table_dtype, mel * args.n_levels + bins[mel], n);
      sum = add(sum, args.table_dtype == DType::kF32
                         ? load(reinterpret_cast<const float*>(entry) + i)
                         : load_bf16(reinterpret_cast<const std::uint16_t*>(entry) + i));
    }
    store(out + i, sum);
  }
  norm_in_place(out, args.norm, args.eps, args.d_model);
}

inline void silu_mul_row(const SiluMulArgs& args, std::int32_t row) {
  const float* gate = args.x + row * args.x_stride;
  const float* up = gate + args.up_offset;
  for (std::int64_t i = 0; i < args.width; i += 16)
    write_row(args.out, row, i, mul(silu(load(gate + i)), load(up + i)));
}

}  // namespace duplex::DUPLEX_ISA
