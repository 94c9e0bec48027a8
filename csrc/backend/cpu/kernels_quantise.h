// Rows quantised to int8, as the panels of kernels_quantised.h meet them. Included by
// kernels_<isa>.cpp; see kernels_gemm.h.
#pragma once

#include "backend/cpu/kernels.h"

namespace duplex::DUPLEX_ISA {

// Codes are round(x * 127 / max |x|) of their group.
inline void quantise_row(const void* x, DType dtype, std::int64_t n_in, DType format, void* out) {
  const std::int64_t group = quantised_group(format);
  const std::int32_t bias = format == DType::kInt8 ? 128 : 8;
  auto* to = static_cast<std::byte*>(out);
  for (std::int64_t begin = 0; begin < n_in; begin += group) {
    const std::int64_t n = n_in - begin < group ? n_in - begin : group;
    F16 values[4];
    F16 largest = zero();
    for (std::int64_t i = 0; i < n; i += 16) {
      const F16 v = dtype == DType::kF32
                        ? load(static_cast<const float*>(x) + begin + i)
                        : load_bf16(static_cast<const std::uint16_t*>(x) + begin + i);
      values[i / 16] = v;
      largest = max(largest, max(v, sub(zero(), v)));
    }
    const float magnitude = reduce_max(largest);
    const F16 inverse = set1(magnitude > 0 ? 127.0f / magnitude : 0.0f);
    I16 sum = splat(0);
    auto* codes = reinterpret_cast<std::int8_t*>(to + sizeof(RowGroup));
    for (std::int64_t i = 0; i < n; i += 16) {
      const I16 rounded = to_codes(round(mul(values[i / 16], inverse)));
      store_codes(codes + i, rounded);
      sum = add(sum, rounded);
    }
    for (std::int64_t i = n; i < group; ++i) codes[i] = 0;
    const RowGroup head{magnitude / 127.0f, -bias * reduce_add(sum)};
    __builtin_memcpy(to, &head, sizeof head);
    to += sizeof(RowGroup) + static_cast<std::size_t>(group);
  }
}

}  // namespace duplex::DUPLEX_ISA
