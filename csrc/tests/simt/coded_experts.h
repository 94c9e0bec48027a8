// Experts whose routed ones are in NVFP4, beside the same values in bfloat16.
#pragma once

#include "tests/simt/coded.h"
#include "tests/simt/experts.h"

namespace duplex::simt_tests {

struct CodedExperts {
  static constexpr std::int32_t kRouted = 6;

  CodedExperts(std::int32_t d_expert, const MatrixScale& up_scale, const MatrixScale& down_scale)
      : plain(with_router(d_expert)),
        up(plain.random, std::int64_t{2} * kRouted * d_expert, Experts::kModel, up_scale),
        down(plain.random, std::int64_t{kRouted} * Experts::kModel, d_expert, down_scale),
        coded(plain) {
    copy(up.values(), plain.up);
    copy(down.values(), plain.down);
    coded.coded_up = &up;
    coded.coded_down = &down;
  }
  CodedExperts(const CodedExperts&) = delete;
  CodedExperts& operator=(const CodedExperts&) = delete;

  Experts plain;
  const CodedTensor up, down;
  Experts coded;

 private:
  static Experts with_router(std::int32_t d_expert) {
    Experts experts({kRouted, 2, 2, d_expert, 1.0f}, DType::kBF16);
    experts.router = random_rows(experts.random, kRouted + 2, Experts::kModel, Experts::kModel);
    return experts;
  }
  static void copy(const RowBuffer& from, RowBuffer& to) {
    for (std::int64_t row = 0; row < from.n_rows(); ++row)
      for (std::int64_t c = 0; c < from.stride(); ++c) to.set(row, c, from.get(row, c));
  }
};

}  // namespace duplex::simt_tests
