// Multi-token prediction: small layers behind the last one, each of which guesses one token more.
//
// Depth d takes for row i the state h of the depth before (of the model, for d = 0) and the
// embedded row i + d + 1, and its output y guesses the token of row i + d + 2:
//     y = block(input_proj [hidden_norm(h), embed_norm(e)]);   logits = head(y / divisor)
// h is the row behind the final norm, then y, behind chain_norm where there is one. Works in the
// buffers of Inkling, so between two of its passes. docs/MODEL.md; next: engine/draft.h.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "model/inkling.h"

namespace duplex {

class Mtp {
 public:
  // All outlive it. `layout` is that of config.mtp_model().
  Mtp(const ModelConfig& config, const Weights& weights, const SequenceLayout& layout,
      Backend& backend, Inkling& model);

  std::size_t n_depths() const { return blocks_.size(); }
  // Where embedded rows go: (max_rows, row_stride of the model).
  float* embedded() { return embedded_; }
  // Runs one depth. The states h are in the model's rows(): for depth 0 the residual stream as
  // forward leaves it, afterwards as the depth before does.
  void run(const Segments& segments, std::int32_t depth);
  // A row of that depth, ready for the head, to the host.
  void read_head_row(std::int32_t row, std::byte* out);

  // Working buffers by name, in bytes.
  const std::vector<std::pair<std::string, std::size_t>>& plan() const { return plan_; }

 private:
  void* make_rows(const char* name, std::int64_t stride, DType dtype);
  void norm(const float* x, const float* weight, std::int32_t n_rows, const Rows& out);

  const ModelConfig& config_;
  const Weights& weights_;
  Backend& backend_;
  Inkling& model_;
  std::vector<Block> blocks_;  // one a depth
  std::vector<std::unique_ptr<Buffer>> buffers_;
  std::vector<std::pair<std::string, std::size_t>> plan_;
  float* embedded_ = nullptr;  // (max_rows, d_model)
  Rows states_;                // (max_rows, d_model) float32, where a norm makes h
  Rows joined_;                // (max_rows, 2 * d_model padded) what input_proj multiplies
  std::vector<float> row_;     // (d_model padded) on its way to the head
};

}  // namespace duplex
