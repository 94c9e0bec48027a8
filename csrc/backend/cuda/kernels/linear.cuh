// What the matrix products of all formats share: the product of one thread block, and the launchers
// of each format (linear.cu picks one).
#pragma once

#include "kernels/common.cuh"
#include "kernels/launchers.h"
#include "kernels/packed.cuh"

namespace duplex::cuda {

// What lies at a place of a product: which row of x, and of y.
struct Place {
  std::int32_t x;
  std::int32_t y;
};

DUPLEX_DEVICE void store_activated(const Rows& rows, std::int64_t row, std::int64_t column,
                                   float gate, float up) {
  store(rows, row, column, silu(gate) * up);
}

// The product of one thread block: places `begin` to `end` of a matrix with given outputs.
struct Job {
  const void* w;
  std::int32_t n_out;
  std::int32_t n_in;
  Rows x;
  bool has_places;      // known when compiled; else place p is row p of both
  const Place* places;  // in shared memory
  std::int32_t begin;
  std::int32_t end;
  float* y;
  std::int64_t y_stride;
  float divisor;
  Rows activated;  // with data, in place of y: silu(gates) * ups

  template <class Element>
  DUPLEX_DEVICE const Element* row(std::int32_t place) const {
    const std::int64_t at = has_places ? places[place].x : place;
    return static_cast<const Element*>(x.data) + at * x.stride;
  }
  DUPLEX_DEVICE std::int64_t out_row(std::int32_t place) const {
    return has_places ? places[place].y : place;
  }
  DUPLEX_DEVICE float* out(std::int32_t place) const { return y + out_row(place) * y_stride; }
};

DUPLEX_DEVICE Job job_of(const LinearArgs& args) {
  return {args.w.data, args.w.n_out, args.w.n_in, args.x,        false,        nullptr,
          0,           args.n_rows,  args.y,      args.y_stride, args.divisor, args.activated};
}

void launch_linear_bf16(Runtime& runtime, const LinearArgs& args);
// More than one thread block of linear_bf16.cuh takes, and enough work for blocks with more of
// them.
bool suits_linear_large(const LinearArgs& args);
void launch_linear_large(Runtime& runtime, const LinearArgs& args);  // the same bits
void launch_linear_mxfp8(Runtime& runtime, const LinearArgs& args);
void launch_linear_nvfp4(Runtime& runtime, const LinearArgs& args);
void launch_linear_quantised(Runtime& runtime, const LinearArgs& args);
void launch_expert_bf16(Runtime& runtime, const ExpertLinearArgs& args);
void launch_expert_mxfp8(Runtime& runtime, const ExpertLinearArgs& args);
void launch_expert_nvfp4(Runtime& runtime, const ExpertLinearArgs& args);
void launch_expert_quantised(Runtime& runtime, const ExpertLinearArgs& args);

}  // namespace duplex::cuda
