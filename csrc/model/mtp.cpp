#include "model/mtp.h"

#include <algorithm>

namespace duplex {

Mtp::Mtp(const ModelConfig& config, const Weights& weights, const SequenceLayout& layout,
         Backend& backend, Inkling& model)
    : config_(config), weights_(weights), backend_(backend), model_(model) {
  for (std::size_t i = 0; i < weights.mtp.layers.size(); ++i)
    blocks_.push_back({&weights.mtp.layers[i].block, config.mtp.layers[i], layout.layers[i]});
  const std::int64_t stride = model.row_stride();
  embedded_ = static_cast<float*>(make_rows("mtp_embedded", stride, DType::kF32));
  states_ = {make_rows("mtp_states", stride, DType::kF32), stride, DType::kF32};
  joined_ = {make_rows("mtp_joined", 2 * stride, weights.dtype), 2 * stride, weights.dtype};
  row_.resize(static_cast<std::size_t>(weights.head.n_in));
}

void* Mtp::make_rows(const char* name, std::int64_t stride, DType dtype) {
  const auto bytes = static_cast<std::size_t>(model_.max_rows() * stride) * dtype_bytes(dtype);
  buffers_.push_back(backend_.allocate(bytes));
  plan_.emplace_back(name, bytes);
  return buffers_.back()->data();
}

void Mtp::norm(const float* x, const float* weight, std::int32_t n_rows, const Rows& out) {
  backend_.norm({.x = x,
                 .x_stride = model_.row_stride(),
                 .weight = weight,
                 .eps = config_.norm_eps,
                 .width = config_.d_model,
                 .n_rows = n_rows,
                 .activation = Activation::kNone,
                 .out = out});
}

void Mtp::run(const Segments& segments, std::int32_t depth) {
  const auto layer = static_cast<std::size_t>(depth);
  const MtpLayerWeights& w = weights_.mtp.layers[layer];
  const float* const link_norm = depth == 0 ? weights_.final_norm : weights_.mtp.chain_norm;
  const float* states = model_.rows();
  if (link_norm != nullptr) {
    norm(states, link_norm, segments.n_rows, states_);
    states = static_cast<const float*>(states_.data);
  }
  Rows second_half = joined_;
  second_half.data = static_cast<std::byte*>(joined_.data) +
                     static_cast<std::size_t>(w.input_proj.n_in / 2) * dtype_bytes(joined_.dtype);
  norm(states, w.hidden_norm, segments.n_rows, joined_);
  norm(embedded_, w.embed_norm, segments.n_rows, second_half);
  backend_.linear({w.input_proj, joined_, segments.n_rows, model_.rows(), model_.row_stride()});
  const float* const head_norm = weights_.mtp.chain_norm;
  model_.run_draft_block(segments, blocks_[layer], depth,
                         head_norm != nullptr ? head_norm : weights_.final_norm);
}

// Without a chain norm the head takes the residual stream as it is.
void Mtp::read_head_row(std::int32_t row, std::byte* out) {
  if (weights_.mtp.chain_norm != nullptr) return model_.read_head_rows({&row, 1}, out);
  const float* const from = model_.rows() + row * model_.row_stride();
  if (weights_.dtype == DType::kF32) return backend_.read(out, from, model_.head_row_bytes());
  backend_.read(row_.data(), from, row_.size() * sizeof(float));
  std::transform(row_.begin(), row_.end(), reinterpret_cast<std::uint16_t*>(out),
                 [](float v) { return float_to_bf16(v); });
}

}  // namespace duplex
