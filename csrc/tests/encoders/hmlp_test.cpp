// Patches of a picture, and the stages of hMLP on the CPU backend against a direct evaluation of
// their definition; parity with the oracle is tested from Python.
#include "encoders/hmlp.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <numbers>
#include <random>

#include "backend/cpu/cpu_backend.h"
#include "core/error.h"

namespace duplex {
namespace {

float gelu(float x) { return 0.5f * x * (1.0f + std::erf(x / std::numbers::sqrt2_v<float>)); }

// A picture of random bytes.
struct Picture {
  Picture(std::int32_t height, std::int32_t width) {
    std::mt19937 random(7);
    bytes.resize(static_cast<std::size_t>(height * width * 3));
    for (auto& byte : bytes) byte = static_cast<std::uint8_t>(random());
    view = {bytes.data(), height, width};
  }
  std::vector<std::uint8_t> bytes;
  ImageView view;
};

VisionConfig small_config() {
  VisionConfig config;
  config.patch_size = 4;
  config.stages = {{1, 2, 12, 20}, {1, 2, 80, 5}, {2, 1, 10, 33}};
  return config;
}

// Row-major weights of a config, and what the backend packs of them.
struct RandomWeights {
  explicit RandomWeights(const VisionConfig& config) {
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    for (const HmlpStage& stage : config.stages) {
      std::vector<float>& w =
          matrices.emplace_back(static_cast<std::size_t>(stage.d_out * stage.d_in));
      std::generate(w.begin(), w.end(), [&] { return normal(random); });
      const auto n_in = static_cast<std::int32_t>(round_up(stage.d_in, kColumnAlign));
      buffers.push_back(backend.allocate(backend.packed_bytes(stage.d_out, n_in, DType::kF32)));
      backend.pack({w.data(), DType::kF32, stage.d_out, stage.d_in},
                   {stage.d_in, stage.d_in, n_in, DType::kF32}, 0, buffers.back()->data());
      std::vector<float>& norm =
          norms.emplace_back(static_cast<std::size_t>(round_up(stage.d_out, kColumnAlign)));
      std::generate_n(norm.begin(), stage.d_out, [&] { return 1.0f + 0.1f * normal(random); });
      packed.linear.push_back({buffers.back()->data(), stage.d_out, n_in, DType::kF32});
      packed.norm.push_back(norm.data());
    }
    packed.final_norm = packed.norm.back();
    packed.norm.pop_back();
  }
  CpuBackend backend{{1, "", -1}};
  std::vector<std::vector<float>> matrices;
  std::vector<std::vector<float>> norms;
  std::vector<std::unique_ptr<Buffer>> buffers;
  HmlpWeights packed;
};

std::vector<float> encode(HmlpEncoder& encoder, const ImageView& image, std::int64_t first,
                          std::int64_t n_patches) {
  std::vector<float> out(static_cast<std::size_t>(n_patches * 48), 0.0f);
  encoder.encode(image, first, n_patches, out.data(), 48);
  return out;
}

TEST_CASE("patches: rows cover the height, columns are one more than fit", "[encoders]") {
  const auto grid = [](std::int32_t height, std::int32_t width) {
    const std::uint8_t pixel[3] = {};
    return patch_grid({pixel, height, width}, 40);
  };
  CHECK(grid(1, 1).n_rows == 1);
  CHECK(grid(1, 1).n_columns == 1);
  CHECK(grid(40, 40).n_rows == 1);
  CHECK(grid(40, 40).n_columns == 2);
  CHECK(grid(41, 39).n_rows == 2);
  CHECK(grid(41, 39).n_columns == 1);
  CHECK(grid(40 * 1024, 40 * 1023).n_patches() == 1 << 20);
  CHECK_THROWS_AS(grid(40 * 1024 + 1, 40 * 1023), InvalidArgument);
  CHECK_THROWS_AS(grid(0, 5), InvalidArgument);
  CHECK_THROWS_AS(grid(5, 0), InvalidArgument);
}

TEST_CASE("patches: pixels are scaled, padding is -1 before scaling, frames repeat", "[encoders]") {
  const double mean[3] = {0.48145466, 0.4578275, 0.40821073};
  const double deviation[3] = {0.26862954, 0.26130258, 0.27577711};
  const VisionConfig config = small_config();
  const Picture picture(6, 8);  // 2 rows of 3 patches; the last column is padding alone
  std::vector<float> pixels(6 * 2 * 4 * 4 * 3);
  preprocess(picture.view, config, 0, 6, pixels.data());
  std::size_t i = 0;
  for (std::int64_t patch = 0; patch < 6; ++patch) {
    for (int t = 0; t < 2; ++t) {
      for (std::int64_t y = patch / 3 * 4; y < patch / 3 * 4 + 4; ++y) {
        for (std::int64_t x = patch % 3 * 4; x < patch % 3 * 4 + 4; ++x) {
          for (std::int64_t c = 0; c < 3; ++c) {
            const auto at = static_cast<std::size_t>((y * 8 + x) * 3 + c);
            const double raw = y < 6 && x < 8 ? picture.bytes[at] : -1.0;
            REQUIRE(pixels[i++] == Approx((raw / 255 - mean[c]) / deviation[c]).margin(1e-6));
          }
        }
      }
    }
  }
  std::vector<float> later(2 * 96);
  preprocess(picture.view, config, 3, 2, later.data());
  CHECK(std::equal(later.begin(), later.end(), pixels.begin() + 3 * 96));
}

// One stage by its definition, on one patch: cells (t, h, w, c) without padding.
std::vector<float> apply_stage(const std::vector<float>& cells, std::int32_t h, std::int32_t c,
                               const HmlpStage& stage, const std::vector<float>& weights,
                               const float* norm, bool is_last) {
  const std::int32_t frames = static_cast<std::int32_t>(cells.size()) / (h * h * c);
  std::vector<float> out;
  for (std::int32_t t = 0; t < frames; t += stage.t_fold) {
    for (std::int32_t y = 0; y < h; y += stage.hw_fold) {
      for (std::int32_t x = 0; x < h; x += stage.hw_fold) {
        std::vector<double> row(static_cast<std::size_t>(stage.d_out));
        double squares = 0;
        for (std::int32_t n = 0; n < stage.d_out; ++n) {
          double& sum = row[static_cast<std::size_t>(n)];
          for (std::int32_t k = 0; k < stage.d_in; ++k) {
            const std::int32_t dx = k / c % stage.hw_fold,
                               dy = k / c / stage.hw_fold % stage.hw_fold;
            const std::int32_t dt = k / c / stage.hw_fold / stage.hw_fold;
            const std::int32_t cell = ((t + dt) * h + y + dy) * h + x + dx;
            sum += static_cast<double>(weights[static_cast<std::size_t>(n * stage.d_in + k)]) *
                   cells[static_cast<std::size_t>(cell * c + k % c)];
          }
          squares += sum * sum;
        }
        for (std::size_t n = 0; n < row.size(); ++n) {
          const double value = row[n] / std::sqrt(squares / stage.d_out + 1e-6) * norm[n];
          out.push_back(is_last ? static_cast<float>(value) : gelu(static_cast<float>(value)));
        }
      }
    }
  }
  return out;
}

TEST_CASE("hmlp: stages equal their definition", "[encoders]") {
  const VisionConfig config = small_config();
  RandomWeights weights(config);
  HmlpEncoder encoder(config, weights.packed, weights.backend, 6);
  const Picture picture(6, 8);
  const std::vector<float> found = encode(encoder, picture.view, 0, 6);
  for (std::int64_t patch = 0; patch < 6; ++patch) {
    std::vector<float> cells(2 * 4 * 4 * 3);
    preprocess(picture.view, config, patch, 1, cells.data());
    cells = apply_stage(cells, 4, 3, config.stages[0], weights.matrices[0], weights.packed.norm[0],
                        false);
    cells = apply_stage(cells, 2, 20, config.stages[1], weights.matrices[1], weights.packed.norm[1],
                        false);
    cells = apply_stage(cells, 1, 5, config.stages[2], weights.matrices[2],
                        weights.packed.final_norm, true);
    REQUIRE(cells.size() == 33);
    for (std::size_t i = 0; i < cells.size(); ++i) {
      const float value = found[static_cast<std::size_t>(patch) * 48 + i];
      REQUIRE(value == Approx(cells[i]).epsilon(1e-4).margin(1e-4));
    }
  }
}

TEST_CASE("hmlp: rows do not depend on how patches are grouped", "[encoders]") {
  const VisionConfig config = small_config();
  RandomWeights weights(config);
  HmlpEncoder large(config, weights.packed, weights.backend, 64);
  HmlpEncoder small(config, weights.packed, weights.backend, 4);
  const Picture picture(17, 21);  // 5 rows of 6 patches
  const std::vector<float> expected = encode(large, picture.view, 0, 30);
  CHECK(encode(small, picture.view, 0, 30) == expected);
  const std::vector<float> middle = encode(small, picture.view, 11, 9);
  CHECK(std::equal(middle.begin(), middle.end(), expected.begin() + 11 * 48));
}

TEST_CASE("hmlp: stages that do not fit together are refused", "[encoders]") {
  RandomWeights weights(small_config());
  const auto refuses = [&](auto spoil, const char* says) {
    VisionConfig vision = small_config();
    spoil(vision);
    CHECK_THROWS_WITH(HmlpEncoder(vision, weights.packed, weights.backend, 1),
                      Catch::Contains(says));
  };
  refuses([](VisionConfig& v) { v.n_channels = 4; }, "n_channels: expected 3");
  refuses([](VisionConfig& v) { v.patch_size += 1; }, "stage 0: expected folds that divide");
  refuses([](VisionConfig& v) { v.patch_size *= 2; }, "fold a patch into one cell");
  refuses([](VisionConfig& v) { v.temporal_patch_size *= 2; }, "fold a patch into one cell");
  refuses([](VisionConfig& v) { v.stages[1].d_in = 79; }, "stage 1: expected d_in 80");
  refuses([](VisionConfig& v) { v.stages.back().d_out = 0; }, "a positive d_out");
  refuses([](VisionConfig& v) { v.stages.clear(); }, "after the last of 0");
}

}  // namespace
}  // namespace duplex
