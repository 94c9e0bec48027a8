// Short convolutions of rows over the tape, and what follows them in a layer. A thread block has
// one row, a thread four columns of it, and all that it reads is on its way at once.
#pragma once

#include "kernels/norm.cuh"

namespace duplex::cuda {

inline constexpr int kTapsAtOnce = 4;

// What is added to the batch's rows: nothing.
struct NoMoreParts {
  DUPLEX_DEVICE void add_to(Four&, std::int32_t, std::int32_t) const {}
};

// All parts but the first, in ascending order.
struct MoreParts {
  const ConvAddNormArgs& args;
  std::int32_t row;  // of the batch

  // To a column of the input that lies so many rows back.
  DUPLEX_DEVICE void add_to(Four& x, std::int32_t back, std::int32_t column) const {
    const std::int64_t at = (row - back) * args.x_stride + column;
#pragma unroll  // places of arguments are known then
    for (int p = 1; p < kMaxParts; ++p) {
      if (p >= args.n_parts) break;
      const Four part = load_four(args.parts[p] + at);
      for (int c = 0; c < kFour; ++c) x.v[c] += part.v[c];
    }
  }
};

// Inputs of one convolution around one row: earlier rows of the same batch are read from the batch
// (another block may be writing their tape copy), older ones from the tape.
struct ConvInput {
  const ConvSlot& slot;
  float scale;       // of the batch
  std::int32_t row;  // inside the segment
  std::int32_t kernel;
  // In shared memory: (kernel) taps, oldest first, null for zeros before the start; behind them
  // where the row's own input goes.
  const float** taps;

  // The convolved values plus the inputs themselves; also leaves the inputs on the tape.
  template <class More = NoMoreParts>
  DUPLEX_DEVICE Four run(std::int32_t column, const More& more = {}) const {
    Four sum{}, self{};
    for (std::int32_t first = 0; first < kernel; first += kTapsAtOnce) {
      Four x[kTapsAtOnce] = {}, w[kTapsAtOnce] = {};
      for (int j = 0; j < kTapsAtOnce; ++j) {
        if (first + j >= kernel) break;
        const float* const tap = taps[first + j];
        if (tap != nullptr) x[j] = load_four(tap + column);
        w[j] = load_four(slot.weight + std::int64_t{first + j} * slot.channels + column);
      }
      for (int j = 0; j < kTapsAtOnce; ++j) {
        if (first + j >= kernel) break;
        const std::int32_t back = kernel - 1 - first - j;
        if (back <= row) more.add_to(x[j], back, column);
        const float factor = back <= row ? scale : 1.0f;
        for (int c = 0; c < kFour; ++c) {
          self.v[c] = x[j].v[c] * factor;
          sum.v[c] = fmaf(self.v[c], w[j].v[c], sum.v[c]);
        }
      }
    }
    store_four(const_cast<float*>(taps[kernel]) + column, self);
    for (int c = 0; c < kFour; ++c) sum.v[c] += self.v[c];
    return sum;
  }
};

// What the shared memory behind a NormRow holds: the taps, where the input goes, the segment.
constexpr std::size_t conv_bytes(std::int32_t kernel) {
  return static_cast<std::size_t>(kernel + 2) * sizeof(float*);
}

// The places of a row's taps, each found by a thread of its own, which also asks for the weights of
// its tap: `x` is the slot's columns of batch row 0, `width` of them, `places` the shared memory
// behind the segment's slot. Ends with a barrier.
DUPLEX_DEVICE ConvInput begin_conv(const Segment& segment, const ConvSlot& slot, const float* x,
                                   std::int64_t x_stride, float scale, std::int32_t width,
                                   std::int32_t batch_row, std::int32_t kernel,
                                   const float** places) {
  const std::int32_t row = batch_row - segment.row_begin;
  const auto tape = [&](std::int64_t at) {
    return reinterpret_cast<float*>(segment.conv.block(at) + slot.offset_bytes);
  };
  for (std::int32_t j = thread_index(); j <= kernel; j += n_threads()) {
    const std::int32_t back = kernel - 1 - j;  // of the last: -1, for the row's own input
    const std::int64_t at = segment.position + row - back;
    if (back >= 0)
      prefetch(slot.weight + std::int64_t{j} * slot.channels,
               static_cast<std::uint32_t>(width) * sizeof(float));
    if (back < 0)
      places[j] = tape(at - 1);
    else if (back <= row)
      places[j] = x + (batch_row - back) * x_stride;
    else
      places[j] = at < 0 ? nullptr : tape(at);
  }
  sync_block();
  return {slot, scale, row, kernel, places};
}

// hidden += conv(x * scale) + x * scale; out = rms_norm(hidden), for one row of the batch.
template <class More>
DUPLEX_DEVICE void conv_add_norm_row(const ConvAddNormArgs& args, std::int32_t row,
                                     const More& more) {
  let_next_grid_begin();
  const NormRow sums = begin_norm(args.norm, args.width);
  auto* const places = reinterpret_cast<const float**>(sums.slot + kFour);
  const Segment& segment = segment_of(args.segments, row, reinterpret_cast<std::int32_t*>(places));
  const ConvInput input = begin_conv(segment, args.conv, args.parts[0], args.x_stride, args.scale,
                                     sums.n, row, args.kernel, places + 1);
  wait_for_previous_grid();
  float* const hidden = args.hidden + row * args.hidden_stride;
  for (std::int32_t i = thread_index() * kFour; i < sums.n; i += n_threads() * kFour) {
    Four h = load_four(hidden + i);
    const Four y = input.run(i, more);
    for (int c = 0; c < kFour; ++c) h.v[c] += y.v[c];
    store_four(hidden + i, h);
    store_four(sums.x + i, h);
  }
  finish_norm(sums, args.eps,
              [&](std::int32_t i, const Four& y) { store_four(args.out, row, i, y); });
}

constexpr std::size_t conv_add_norm_bytes(const ConvAddNormArgs& args) {
  return NormRow::bytes(args.width) + conv_bytes(args.kernel);
}

}  // namespace duplex::cuda
