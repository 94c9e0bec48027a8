// Short convolutions, and the operation that adds one to the residual stream. Included by
// kernels_<isa>.cpp; see kernels_gemm.h.
#pragma once

#include "backend/cpu/kernels.h"
#include "backend/cpu/kernels_rows.h"

namespace duplex::DUPLEX_ISA {

// Inputs of one convolution around one row: earlier rows of the same batch are read from the batch
// (another thread may be writing their tape copy), older ones from the tape.
template <bool kHasMore>
struct ConvInput {
  const Segment* segment;
  const ConvSlot* slot;
  const float* x;  // the slot's columns of batch row 0
  std::int64_t x_stride;
  float scale;
  std::int32_t row;  // inside the segment
  std::int32_t kernel;
  const float* const* more = nullptr;  // (n_more) what is added to x, in this order
  std::int32_t n_more = 0;

  std::int64_t position() const { return segment->position + row; }
  float* tape(std::int64_t at) const {
    return reinterpret_cast<float*>(segment->conv.block(at) + slot->offset_bytes);
  }
  // Input of tap j at column i: x at position - (kernel - 1) + j, zero before the start.
  F16 tap(std::int32_t j, std::int64_t i) const {
    const std::int32_t back = kernel - 1 - j;
    if (back <= row) {
      const std::int64_t at = (segment->row_begin + row - back) * x_stride + i;
      F16 sum = load(x + at);
      if constexpr (kHasMore)
        for (std::int32_t p = 0; p < n_more; ++p) sum = add(sum, load(more[p] + at));
      return mul(sum, set1(scale));
    }
    if (position() - back < 0) return zero();
    return load(tape(position() - back) + i);
  }
  // The convolved value plus the input itself; also leaves the input on the tape.
  F16 run(std::int64_t i) const {
    const auto weight = [&](std::int32_t j) {
      return load(slot->weight + std::int64_t{j} * slot->channels + i);
    };
    F16 sum = zero();
    for (std::int32_t j = 0; j + 1 < kernel; ++j) sum = fma(tap(j, i), weight(j), sum);
    const F16 self = tap(kernel - 1, i);
    store(tape(position()) + i, self);
    return add(fma(self, weight(kernel - 1), sum), self);
  }
};

template <bool kHasMore>
inline void conv_add_row(const ConvAddNormArgs& args, const Segment& segment, std::int32_t row,
                         float* hidden) {
  const ConvInput<kHasMore> input{&segment,      &args.conv,     args.parts[0],
                                  args.x_stride, args.scale,     row,
                                  args.kernel,   args.parts + 1, args.n_parts - 1};
  const std::int64_t n = round_up(args.width, kColumnAlign);
  for (std::int64_t i = 0; i < n; i += 16) store(hidden + i, add(load(hidden + i), input.run(i)));
}

inline void conv_add_norm_row(const ConvAddNormArgs& args, const Segment& segment,
                              std::int32_t row) {
  const std::int64_t batch_row = segment.row_begin + row;
  float* hidden = args.hidden + batch_row * args.hidden_stride;
  if (args.n_parts == 1)
    conv_add_row<false>(args, segment, row, hidden);
  else
    conv_add_row<true>(args, segment, row, hidden);
  const std::int64_t n = round_up(args.width, kColumnAlign);
  const F16 scale = set1(inverse_rms(hidden, n, args.width, args.eps));
  for (std::int64_t i = 0; i < n; i += 16)
    write_row(args.out, batch_row, i, mul(mul(load(hidden + i), scale), load(args.norm + i)));
}

}  // namespace duplex::DUPLEX_ISA
