#include "model/weight_builder.h"

#include <algorithm>
#include <cmath>

#include "backend/quantised.h"
#include "core/error.h"

namespace duplex {
namespace {

constexpr std::int64_t kAlignBytes = 64;
// Source bytes packed before their file pages are given back.
constexpr std::int64_t kStripeBytes = std::int64_t{4} << 20;

[[noreturn]] void fail_not_finite(const SourceTensor& tensor, std::int64_t element,
                                  std::int64_t n) {
  const SourceTensor& culprit = tensor.culprit(element, n);
  const bool is_scale = &culprit != &tensor;
  fail<CheckpointError>("checkpoint: tensor '", culprit.name, "' holds a NaN or infinity ",
                        is_scale ? "for '" + tensor.name + "' " : "", "near element ", element,
                        "; the file is damaged or the training diverged");
}

// What a backend packs as it is; all else is decoded first.
bool is_plain(const SourceTensor& tensor) {
  return tensor.type == FileType::kF32 || tensor.type == FileType::kBF16;
}

std::int64_t stripe_rows(const SourceTensor& tensor, std::int64_t row_elements, bool is_decoded) {
  const std::int64_t element_bits = is_decoded ? 32 : file_type_bits(tensor.type);
  const std::int64_t rows = kStripeBytes * 8 / (row_elements * element_bits);
  return round_up(std::max<std::int64_t>(rows, 1), kPanelOutputs);
}

// Whether n_in columns from `first` on can lie in memory as the file has them, in NVFP4: groups of
// columns stay whole, and no tile of outputs has rows of two matrices, whose scales differ.
bool keeps_nvfp4(const std::vector<OutputRows>& outputs, std::int64_t first, std::int64_t n_in,
                 std::int64_t group) {
  if (group != n_in && group % kNvfp4Group != 0) return false;
  std::int64_t output = 0;
  for (const OutputRows& rows : outputs) {
    if (rows.tensor != nullptr &&
        (!rows.tensor->is_nvfp4() || output % kColumnAlign != 0 ||
         (rows.first + first) % rows.tensor->n_columns() % kNvfp4Group != 0))
      return false;
    output += rows.n_rows;
  }
  return true;
}

// Rows of NVFP4 from an element on, as they lie in the file.
PackSource coded_rows(const SourceTensor& tensor, std::int64_t element, std::int64_t n_rows,
                      std::int64_t row_stride) {
  const std::int64_t width = tensor.n_columns();
  PackSource source{tensor.at(element), DType::kNvfp4, n_rows, row_stride};
  source.scales = tensor.block_scale(element);
  source.scale_row_stride = row_stride / width * div_up(width, kNvfp4Group);
  source.matrix_scale = {tensor.global_scale(element), tensor.scales.is_divisor};
  return source;
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
  is_filling_ = true;
  base_ = base;
  total_ = bytes;
  offset_ = 0;
}

void WeightBuilder::start_placing(std::byte* base) {
  base_ = base;
  offset_ = 0;
}

void WeightBuilder::report() {
  if (progress_) progress_(offset_, total_);
}

const float* WeightBuilder::write_floats(float* out) {
  backend_.write(out, floats_.data(), floats_.size() * sizeof(float));
  return out;
}

void WeightBuilder::read(const SourceTensor& tensor, std::int64_t begin, std::int64_t n,
                         float* out) {
  tensor.read(begin, n, out);
  for (std::int64_t i = 0; i < n; ++i)
    if (!std::isfinite(out[i])) [[unlikely]]
      fail_not_finite(tensor, begin + i, 1);
}

float WeightBuilder::scalar(const SourceTensor& tensor) {
  float value = 1.0f;
  auto* slot = take<float>(1);
  if (slot == nullptr) return value;
  if (is_filling_) {
    read(tensor, 0, 1, &value);
    backend_.write(slot, &value, sizeof value);
  }
  backend_.read(&value, slot, sizeof value);
  return value;
}

const float* WeightBuilder::vector(const SourceTensor& tensor) {
  const std::int64_t n = tensor.elements();
  const std::int64_t padded = round_up(n, kColumnAlign);
  auto* out = take<float>(padded);
  if (!is_filling_) return out;
  floats_.assign(static_cast<std::size_t>(padded), 0.0f);
  read(tensor, 0, n, floats_.data());
  tensor.release(0, n);
  return write_floats(out);
}

const float* WeightBuilder::convolution(const SourceTensor& tensor, const Slice& channels,
                                        std::int64_t group) {
  const std::int64_t n = channels.n;
  const std::int64_t kernel = tensor.shape[2];
  const std::int64_t group_padded = round_up(group, kColumnAlign);
  const std::int64_t padded = n / group * group_padded;
  auto* out = take<float>(kernel * padded);
  if (!is_filling_) return out;
  std::vector<float> values(static_cast<std::size_t>(n * kernel));
  read(tensor, channels.first * kernel, n * kernel, values.data());
  floats_.assign(static_cast<std::size_t>(kernel * padded), 0.0f);
  for (std::int64_t c = 0; c < n; ++c)
    for (std::int64_t j = 0; j < kernel; ++j)
      floats_[static_cast<std::size_t>(j * padded + c / group * group_padded + c % group)] =
          values[static_cast<std::size_t>(c * kernel + j)];
  return write_floats(out);
}

const float* WeightBuilder::rel_bank(const SourceTensor& tensor, std::int64_t& stride) {
  const std::int64_t extent = tensor.shape[1];
  stride = round_up(extent + 2 * kBlockPositions, kColumnAlign);
  const std::int64_t n_rows = tensor.shape[0];
  auto* out = take<float>(n_rows * stride);
  if (!is_filling_) return out;
  floats_.assign(static_cast<std::size_t>(n_rows * stride), 0.0f);
  for (std::int64_t k = 0; k < n_rows; ++k) {
    float* const row = floats_.data() + k * stride + kBlockPositions;
    read(tensor, k * extent, extent, row);
    std::reverse(row, row + extent);
  }
  return write_floats(out);
}

const void* WeightBuilder::table(const SourceTensor& tensor) {
  const std::int64_t width = tensor.shape[1];
  const std::int64_t padded = round_up(width, kColumnAlign);
  const std::int64_t row_bytes = padded * static_cast<std::int64_t>(dtype_bytes(dtypes_.rows));
  auto* out = take<std::byte>(tensor.shape[0] * row_bytes);
  if (!is_filling_) return out;
  const std::int64_t stripe = stripe_rows(tensor, width, !is_plain(tensor));
  std::vector<std::byte> rows;
  floats_.resize(static_cast<std::size_t>(width));
  for (std::int64_t begin = 0; begin < tensor.shape[0]; begin += stripe) {
    const std::int64_t end = std::min(begin + stripe, tensor.shape[0]);
    rows.assign(static_cast<std::size_t>((end - begin) * row_bytes), std::byte{0});
    for (std::int64_t row = begin; row < end; ++row) {
      read(tensor, row * width, width, floats_.data());
      std::byte* const at = rows.data() + (row - begin) * row_bytes;
      if (dtypes_.rows == DType::kF32)
        std::copy_n(floats_.data(), width, reinterpret_cast<float*>(at));
      else
        std::transform(floats_.begin(), floats_.end(), reinterpret_cast<std::uint16_t*>(at),
                       [](float v) { return float_to_bf16(v); });
    }
    backend_.write(out + begin * row_bytes, rows.data(), rows.size());
    tensor.release(begin * width, end * width);
    report();
  }
  return out;
}

PackedMatrix WeightBuilder::matrix(const std::vector<OutputRows>& outputs, std::int64_t n_in,
                                   std::int64_t group, DType wanted, std::int32_t n_parts,
                                   bool is_gate_up) {
  const std::int64_t n_runs = n_matrices(n_parts);
  const std::int64_t n_in_run = n_in / n_runs;
  bool is_kept = wanted == DType::kNvfp4;
  for (std::int64_t run = 0; run < n_runs && is_kept; ++run)
    is_kept = keeps_nvfp4(outputs, run * n_in_run, n_in_run, group);
  const DType dtype = wanted == DType::kNvfp4 && !is_kept ? dtypes_.rows : wanted;
  std::int64_t n_out = 0;
  for (const OutputRows& rows : outputs) n_out += rows.n_rows;
  const std::int64_t group_padded = round_up(group, kColumnAlign);
  const std::int64_t padded = div_up(n_in_run, group) * group_padded;
  const bool is_paired = is_gate_up && backend_.pairs_gate_up(dtype);
  const Runs runs{{static_cast<std::int32_t>(n_in_run), static_cast<std::int32_t>(group),
                   static_cast<std::int32_t>(group_padded), dtype,
                   is_paired ? static_cast<std::int32_t>(n_out / 2) : 0},
                  n_runs,
                  backend_.packed_bytes(n_out, padded, dtype)};
  PackedMatrix packed;
  packed.n_out = static_cast<std::int32_t>(n_out);
  packed.n_in = static_cast<std::int32_t>(n_runs * padded);
  packed.dtype = dtype;
  packed.is_paired = is_paired;
  auto* out = take<std::byte>(n_runs * static_cast<std::int64_t>(runs.bytes));
  packed.data = out;
  if (!is_filling_) return packed;
  std::int64_t output = 0;
  for (const OutputRows& rows : outputs) {
    if (rows.tensor != nullptr) pack_stripes(rows, runs, output, out);
    output += rows.n_rows;
  }
  return packed;
}

// note: all runs of a stripe before the next stripe, so that the file is read once.
void WeightBuilder::pack_stripes(const OutputRows& rows, const Runs& runs, std::int64_t first_out,
                                 std::byte* out) {
  const SourceTensor& tensor = *rows.tensor;
  const std::int64_t n_in = runs.shape.n_in;
  const bool is_decoded = !is_plain(tensor) && runs.shape.dtype != DType::kNvfp4;
  const std::int64_t stripe = stripe_rows(tensor, rows.row_stride, is_decoded);
  for (std::int64_t begin = 0; begin < rows.n_rows; begin += stripe) {
    const std::int64_t n = std::min(stripe, rows.n_rows - begin);
    const std::int64_t element = rows.first + begin * rows.row_stride;
    for (std::int64_t run = 0; run < runs.n; ++run)
      pack_rows(rows, element + run * n_in, n, runs.shape, first_out + begin,
                out + static_cast<std::size_t>(run) * runs.bytes);
    tensor.release(element, element + (n - 1) * rows.row_stride + runs.n * n_in);
    report();
  }
}

void WeightBuilder::pack_rows(const OutputRows& rows, std::int64_t element, std::int64_t n_rows,
                              const PackShape& shape, std::int64_t first_out, std::byte* out) {
  const SourceTensor& tensor = *rows.tensor;
  PackSource source;
  if (shape.dtype == DType::kNvfp4) {
    source = coded_rows(tensor, element, n_rows, rows.row_stride);
  } else if (is_plain(tensor)) {
    const DType dtype = tensor.type == FileType::kF32 ? DType::kF32 : DType::kBF16;
    source = {tensor.at(element), dtype, n_rows, rows.row_stride};
  } else {
    decoded_.resize(static_cast<std::size_t>(n_rows * shape.n_in));
    for (std::int64_t row = 0; row < n_rows; ++row)
      tensor.read(element + row * rows.row_stride, shape.n_in, decoded_.data() + row * shape.n_in);
    source = {decoded_.data(), DType::kF32, n_rows, shape.n_in};
  }
  const std::int64_t bad = backend_.pack(source, shape, first_out, out);
  if (bad >= 0) fail_not_finite(tensor, element + bad * rows.row_stride, shape.n_in);
}

}  // namespace duplex
