// Pixels to normalised patches, then for each stage: fold, linear, norm. Three buffers serve all
// stages: a fold has read the cells before a norm overwrites them.
#include "encoders/hmlp.h"

#include <algorithm>
#include <array>
#include <utility>

#include "core/error.h"

namespace duplex {
namespace {

constexpr std::int32_t kChannels = 3;
constexpr std::int64_t kMaxPatches = std::int64_t{1} << 20;
constexpr float kPadValue = -1.0f;  // in raw pixel units, so below black after scaling

// Mean and standard deviation of CLIP's training pictures, in raw pixel units.
constexpr std::array<float, kChannels> kMean = {0.48145466f * 255.0f, 0.4578275f * 255.0f,
                                                0.40821073f * 255.0f};
constexpr std::array<float, kChannels> kStd = {0.26862954f * 255.0f, 0.26130258f * 255.0f,
                                               0.27577711f * 255.0f};

void write_pixel(const std::uint8_t* pixel, float* out) {  // nullptr: padding
  for (std::size_t c = 0; c < kChannels; ++c) {
    const float value = pixel != nullptr ? static_cast<float>(pixel[c]) : kPadValue;
    out[c] = (value - kMean[c]) / kStd[c];
  }
}

// One frame of the patch whose first pixel is (top, left).
void write_frame(const ImageView& image, std::int32_t patch_size, std::int64_t top,
                 std::int64_t left, float* out) {
  for (std::int64_t y = top; y < top + patch_size; ++y) {
    for (std::int64_t x = left; x < left + patch_size; ++x, out += kChannels) {
      const bool inside = y < image.height && x < image.width;
      write_pixel(inside ? image.data + (y * image.width + x) * kChannels : nullptr, out);
    }
  }
}

}  // namespace

PatchGrid patch_grid(const ImageView& image, std::int32_t patch_size) {
  check(image.height > 0 && image.width > 0, "image: expected at least one pixel, found (",
        image.height, ", ", image.width, "); leave an empty picture out");
  const PatchGrid grid{div_up(image.height, patch_size), image.width / patch_size + 1};
  check(grid.n_patches() <= kMaxPatches, "image: expected at most ", kMaxPatches,
        " patches, found ", grid.n_patches(), " for (", image.height, ", ", image.width,
        ") pixels; shrink the picture");
  return grid;
}

void preprocess(const ImageView& image, const VisionConfig& config, std::int64_t first_patch,
                std::int64_t n_patches, float* pixels) {
  const PatchGrid grid = patch_grid(image, config.patch_size);
  const std::int64_t frame_values = std::int64_t{config.patch_size} * config.patch_size * kChannels;
  for (std::int64_t patch = first_patch; patch < first_patch + n_patches; ++patch) {
    const std::int64_t top = patch / grid.n_columns * config.patch_size;
    const std::int64_t left = patch % grid.n_columns * config.patch_size;
    write_frame(image, config.patch_size, top, left, pixels);
    for (std::int32_t t = 1; t < config.temporal_patch_size; ++t) {
      std::copy_n(pixels, frame_values, pixels + t * frame_values);
    }
    pixels += config.temporal_patch_size * frame_values;
  }
}

HmlpEncoder::HmlpEncoder(const VisionConfig& config, HmlpWeights weights, Backend& backend,
                         std::int64_t max_patches)
    : config_(config), weights_(std::move(weights)), backend_(&backend), max_patches_(max_patches) {
  plan_stages();
  allocate();
}

void HmlpEncoder::plan_stages() {
  check(config_.n_channels == kChannels, "hmlp: n_channels: expected 3 (RGB), found ",
        config_.n_channels);
  std::int32_t t = config_.temporal_patch_size, hw = config_.patch_size, c = kChannels;
  std::int64_t cell_stride = kChannels;  // pixels lie close, later cells are padded
  for (std::size_t i = 0; i < config_.stages.size(); ++i) {
    const HmlpStage& stage = config_.stages[i];
    check(
        stage.t_fold >= 1 && stage.hw_fold >= 1 && t % stage.t_fold == 0 && hw % stage.hw_fold == 0,
        "hmlp: stage ", i, ": expected folds that divide its cells (", t, ", ", hw, ", ", hw,
        "), found t_fold ", stage.t_fold, " and hw_fold ", stage.hw_fold);
    const std::int32_t d_in = stage.t_fold * stage.hw_fold * stage.hw_fold * c;
    check(stage.d_in == d_in && stage.d_out >= 1, "hmlp: stage ", i, ": expected d_in ", d_in,
          " and a positive d_out, found ", stage.d_in, " and ", stage.d_out);
    const std::int32_t t_out = t / stage.t_fold, hw_out = hw / stage.hw_fold;
    stages_.push_back({t, hw, c, stage.t_fold, stage.hw_fold, cell_stride,
                       std::int64_t{t_out} * hw_out * hw_out, round_up(d_in, kColumnAlign),
                       round_up(stage.d_out, kPanelOutputs)});
    t = t_out;
    hw = hw_out;
    c = stage.d_out;
    cell_stride = round_up(c, kColumnAlign);
  }
  check(!stages_.empty() && t == 1 && hw == 1,
        "hmlp: expected stages that fold a patch into one cell, found (", t, ", ", hw, ", ", hw,
        ") cells after the last of ", stages_.size());
}

void HmlpEncoder::allocate() {
  std::int64_t cell_values = 0, folded_values = 0, linear_values = 0;  // of one patch
  for (const Stage& stage : stages_) {
    const std::int64_t n_cells = std::int64_t{stage.t} * stage.hw * stage.hw;
    cell_values = std::max(cell_values, n_cells * stage.cell_stride);
    folded_values = std::max(folded_values, stage.n_out_cells * stage.folded_width);
    linear_values = std::max(linear_values, stage.n_out_cells * stage.linear_width);
  }
  const auto allocate_rows = [&](std::int64_t values_per_patch, DType dtype) {
    return backend_->allocate(static_cast<std::size_t>(max_patches_ * values_per_patch) *
                              dtype_bytes(dtype));
  };
  pixels_.resize(static_cast<std::size_t>(max_patches_ * stages_[0].t * stages_[0].hw *
                                          stages_[0].hw * kChannels));
  cells_ = allocate_rows(cell_values, DType::kF32);
  folded_ = allocate_rows(folded_values, weights_.linear[0].dtype);
  linear_ = allocate_rows(linear_values, DType::kF32);
}

void HmlpEncoder::encode(const ImageView& image, std::int64_t first_patch, std::int64_t n_patches,
                         float* out, std::int64_t out_stride) {
  const std::size_t patch_bytes =
      pixels_.size() / static_cast<std::size_t>(max_patches_) * sizeof(float);
  for (std::int64_t done = 0; done < n_patches; done += max_patches_) {
    const std::int64_t n_now = std::min(max_patches_, n_patches - done);
    preprocess(image, config_, first_patch + done, n_now, pixels_.data());
    backend_->write(cells_->data(), pixels_.data(), static_cast<std::size_t>(n_now) * patch_bytes);
    encode_batch(static_cast<std::int32_t>(n_now), out + done * out_stride, out_stride);
  }
}

void HmlpEncoder::encode_batch(std::int32_t n_patches, float* out, std::int64_t out_stride) {
  auto* const cells = static_cast<float*>(cells_->data());
  auto* const linear = static_cast<float*>(linear_->data());
  for (std::size_t i = 0; i < stages_.size(); ++i) {
    const Stage& stage = stages_[i];
    const PackedMatrix& w = weights_.linear[i];
    const bool is_last = i + 1 == stages_.size();
    const auto n_rows = static_cast<std::int32_t>(n_patches * stage.n_out_cells);
    const Rows folded{folded_->data(), stage.folded_width, w.dtype};
    backend_->fold({.x = cells,
                    .x_stride = stage.cell_stride,
                    .n_patches = n_patches,
                    .t = stage.t,
                    .h = stage.hw,
                    .w = stage.hw,
                    .c = stage.c,
                    .t_fold = stage.t_fold,
                    .hw_fold = stage.hw_fold,
                    .out = folded});
    backend_->linear(
        {.w = w, .x = folded, .n_rows = n_rows, .y = linear, .y_stride = stage.linear_width});
    const Rows next_cells{cells, round_up(w.n_out, kColumnAlign), DType::kF32};
    backend_->norm({.x = linear,
                    .x_stride = stage.linear_width,
                    .weight = is_last ? weights_.final_norm : weights_.norm[i],
                    .eps = kTowerNormEps,
                    .width = w.n_out,
                    .n_rows = n_rows,
                    .activation = is_last ? Activation::kNone : Activation::kGelu,
                    .out = is_last ? Rows{out, out_stride, DType::kF32} : next_cells});
  }
}

}  // namespace duplex
