// Hierarchical-MLP vision (hMLP): a picture to patches to one row of the sequence per patch.
//
// Each stage folds a block of neighbouring cells into one and maps it linearly, until a patch is a
// single cell as wide as the model. Patches do not see each other. The weights belong to
// model/weights.h, the computing to the backend, and pictures arrive here as RGB bytes: decoding
// and resizing are Python's. The exact maths: docs/MODEL.md and duplex_engine/reference/hmlp.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "core/config.h"

namespace duplex {

// RGB bytes, (height, width, 3).
struct ImageView {
  const std::uint8_t* data = nullptr;
  std::int32_t height = 0;
  std::int32_t width = 0;
};

struct PatchGrid {
  std::int64_t n_rows = 0;
  std::int64_t n_columns = 0;

  std::int64_t n_patches() const { return n_rows * n_columns; }
};

// The grid as the model was trained: a width that is a multiple of the patch ends in a column of
// padding alone. Throws InvalidArgument for an empty picture and for more than 2^20 patches.
PatchGrid patch_grid(const ImageView& image, std::int32_t patch_size);

// Normalised pixels of `n_patches` patches of a still picture, counted row by row; every frame of
// a patch is the same.
void preprocess(const ImageView& image, const VisionConfig& config, std::int64_t first_patch,
                std::int64_t n_patches,
                float* pixels);  // (n_patches, temporal_patch_size, patch_size, patch_size, 3)

struct HmlpWeights {
  std::vector<PackedMatrix> linear;  // one a stage
  std::vector<const float*> norm;    // one a stage but the last, padded to kColumnAlign
  const float* final_norm = nullptr;
};

class HmlpEncoder {
 public:
  // Allocates room for `max_patches` at a time. Weights and backend must outlive the encoder.
  HmlpEncoder(const VisionConfig& config, HmlpWeights weights, Backend& backend,
              std::int64_t max_patches);

  // Writes the rows of any number of patches, max_patches at a time. Call inside a pass.
  void encode(const ImageView& image, std::int64_t first_patch, std::int64_t n_patches,
              float* out,  // (n_patches, out_stride), d_model columns and zeros behind them
              std::int64_t out_stride);

 private:
  // What one stage sees of one patch.
  struct Stage {
    std::int32_t t, hw, c;  // (t, hw, hw, c): cells that come in
    std::int32_t t_fold, hw_fold;
    std::int64_t cell_stride;  // elements from one incoming cell to the next
    std::int64_t n_out_cells;
    std::int64_t folded_width;  // padded
    std::int64_t linear_width;  // padded to whole panels
  };

  void plan_stages();
  void allocate();
  void encode_batch(std::int32_t n_patches, float* out, std::int64_t out_stride);

  VisionConfig config_;
  HmlpWeights weights_;
  Backend* backend_;
  std::int64_t max_patches_;
  std::vector<Stage> stages_;
  std::vector<float> pixels_;       // of max_patches, on the host
  std::unique_ptr<Buffer> cells_;   // float32: pixels, then the normalised cells of a stage
  std::unique_ptr<Buffer> folded_;  // GEMM dtype: what a stage multiplies
  std::unique_ptr<Buffer> linear_;  // float32: what comes out
};

}  // namespace duplex
