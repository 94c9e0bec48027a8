#include "model/weight_builder.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace duplex {
namespace {

constexpr std::int64_t kAlignBytes = 64;
// Source bytes packed before their file pages are given back.
constexpr std::int64_t kStripeBytes = std::int64_t{4} << 20;

[[noreturn]] void fail_not_finite(const SourceTensor& tensor, std::int64_t element) {
  fail<CheckpointError>("checkpoint: tensor '", tensor.name,
                        "' holds a NaN or infinity near element ", element,
                        "; the file is damaged or the training diverged");
}

float value(const SourceTensor& tensor, std::int64_t i) {
  const float v = load_element(tensor.data, tensor.dtype, i);
  if (!std::isfinite(v)) [[unlikely]]
    fail_not_finite(tensor, i);
  return v;
}

std::int64_t stripe_rows(const SourceTensor& tensor, std::int64_t row_elements) {
  const auto row_bytes = row_elements * static_cast<std::int64_t>(dtype_bytes(tensor.dtype));
  return round_up(std::max<std::int64_t>(kStripeBytes / row_bytes, 1), kPanelOutputs);
}

}  // namespace

template <class T>
T* WeightBuilder::take(std::int64_t count) {
  const std::size_t at = offset_;
  offset_ +=
      static_cast<std::size_t>(round_up(count * static_cast<std::int64_t>(sizeof(T)), kAlignBytes));
  return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
}

void WeightBuilder::start_filling(std::byte* base, std::size_t bytes) {
  base_ = base;
  total_ = bytes;
  offset_ = 0;
}

void WeightBuilder::report() {
  if (progress_) progress_(offset_, total_);
}

const float* WeightBuilder::write_floats(float* out) {
  backend_.write(out, floats_.data(), floats_.size() * sizeof(float));
  return out;
}

float WeightBuilder::scalar(const SourceTensor& tensor) {
  return base_ == nullptr ? 1.0f : value(tensor, 0);
}

const float* WeightBuilder::vector(const SourceTensor& tensor, std::int64_t group,
                                   std::int64_t group_padded) {
  const std::int64_t n = tensor.elements();
  const std::int64_t padded = round_up(n / group * group_padded, kColumnAlign);
  auto* out = take<float>(padded);
  if (out == nullptr) return nullptr;
  floats_.assign(static_cast<std::size_t>(padded), 0.0f);
  for (std::int64_t i = 0; i < n; ++i)
    floats_[static_cast<std::size_t>(i / group * group_padded + i % group)] = value(tensor, i);
  tensor.release(0, n);
  return write_floats(out);
}

const float* WeightBuilder::convolution(const SourceTensor& tensor, std::int64_t group,
                                        std::int64_t group_padded) {
  const std::int64_t channels = tensor.shape[0];
  const std::int64_t kernel = tensor.shape[2];
  const std::int64_t padded = round_up(channels / group * group_padded, kColumnAlign);
  auto* out = take<float>(kernel * padded);
  if (out == nullptr) return nullptr;
  floats_.assign(static_cast<std::size_t>(kernel * padded), 0.0f);
  for (std::int64_t c = 0; c < channels; ++c)
    for (std::int64_t j = 0; j < kernel; ++j)
      floats_[static_cast<std::size_t>(j * padded + c / group * group_padded + c % group)] =
          value(tensor, c * kernel + j);
  return write_floats(out);
}

const float* WeightBuilder::rel_bank(const SourceTensor& tensor, std::int64_t& stride) {
  const std::int64_t extent = tensor.shape[1];
  stride = round_up(extent + 2 * kBlockPositions, kColumnAlign);
  auto* out = take<float>(tensor.shape[0] * stride);
  if (out == nullptr) return nullptr;
  floats_.assign(static_cast<std::size_t>(tensor.shape[0] * stride), 0.0f);
  for (std::int64_t k = 0; k < tensor.shape[0]; ++k)
    for (std::int64_t d = 0; d < extent; ++d)
      floats_[static_cast<std::size_t>(k * stride + kBlockPositions + extent - 1 - d)] =
          value(tensor, k * extent + d);
  return write_floats(out);
}

const void* WeightBuilder::table(const SourceTensor& tensor) {
  const std::int64_t width = tensor.shape[1];
  const std::int64_t padded = round_up(width, kColumnAlign);
  const std::int64_t row_bytes = padded * static_cast<std::int64_t>(dtype_bytes(dtypes_.rows));
  auto* out = take<std::byte>(tensor.shape[0] * row_bytes);
  if (out == nullptr) return nullptr;
  const std::int64_t stripe = stripe_rows(tensor, width);
  std::vector<std::byte> rows;
  for (std::int64_t begin = 0; begin < tensor.shape[0]; begin += stripe) {
    const std::int64_t end = std::min(begin + stripe, tensor.shape[0]);
    rows.assign(static_cast<std::size_t>((end - begin) * row_bytes), std::byte{0});
    for (std::int64_t row = begin; row < end; ++row)
      for (std::int64_t c = 0; c < width; ++c) {
        const float v = value(tensor, row * width + c);
        const std::int64_t at = (row - begin) * padded + c;
        if (dtypes_.rows == DType::kF32)
          reinterpret_cast<float*>(rows.data())[at] = v;
        else
          reinterpret_cast<std::uint16_t*>(rows.data())[at] = float_to_bf16(v);
      }
    backend_.write(out + begin * row_bytes, rows.data(), rows.size());
    tensor.release(begin * width, end * width);
    report();
  }
  return out;
}

PackedMatrix WeightBuilder::matrix(const std::vector<OutputRows>& outputs, std::int64_t n_in,
                                   std::int64_t group, std::int64_t group_padded, DType dtype) {
  std::int64_t n_out = 0;
  for (const OutputRows& rows : outputs) n_out += rows.n_rows;
  PackedMatrix packed;
  packed.n_out = static_cast<std::int32_t>(n_out);
  packed.n_in =
      static_cast<std::int32_t>(round_up(div_up(n_in, group) * group_padded, kColumnAlign));
  packed.dtype = dtype;
  auto* out =
      take<std::byte>(static_cast<std::int64_t>(backend_.packed_bytes(n_out, packed.n_in, dtype)));
  packed.data = out;
  if (out == nullptr) return packed;
  const PackShape shape{static_cast<std::int32_t>(n_in), static_cast<std::int32_t>(group),
                        static_cast<std::int32_t>(group_padded), dtype};
  std::int64_t output = 0;
  for (const OutputRows& rows : outputs) {
    if (rows.tensor != nullptr) pack_stripes(rows, shape, output, out);
    output += rows.n_rows;
  }
  return packed;
}

void WeightBuilder::pack_stripes(const OutputRows& rows, const PackShape& shape,
                                 std::int64_t first_out, std::byte* out) {
  const std::int64_t stripe = stripe_rows(*rows.tensor, rows.row_stride);
  for (std::int64_t begin = 0; begin < rows.n_rows; begin += stripe) {
    const std::int64_t n = std::min(stripe, rows.n_rows - begin);
    const std::int64_t element = rows.first + begin * rows.row_stride;
    const PackSource source{rows.tensor->at(element), rows.tensor->dtype, n, rows.row_stride};
    const std::int64_t bad = backend_.pack(source, shape, first_out + begin, out);
    if (bad >= 0) fail_not_finite(*rows.tensor, element + bad * rows.row_stride);
    rows.tensor->release(element, element + (n - 1) * rows.row_stride + shape.n_in);
    report();
  }
}

}  // namespace duplex
