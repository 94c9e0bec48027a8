// Patches of a picture, and the stages of hMLP against a direct evaluation of their definition.
// The operations come from a backend written here as plainly as possible, whose packed matrices
// are row-major floats; parity with the oracle is tested from Python.
#include "encoders/hmlp.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <numbers>
#include <random>

#include "core/error.h"

namespace duplex {
namespace {

float gelu(float x) { return 0.5f * x * (1.0f + std::erf(x / std::numbers::sqrt2_v<float>)); }

class HostBuffer : public Buffer {
 public:
  explicit HostBuffer(std::size_t bytes) : memory_(bytes) {}
  void* data() const override { return const_cast<std::byte*>(memory_.data()); }
  std::size_t bytes() const override { return memory_.size(); }

 private:
  std::vector<std::byte> memory_;
};

class PlainBackend : public Backend {
 public:
  std::string name() const override { return "plain"; }
  std::string description() const override { return "plain"; }
  int n_threads() const override { return 1; }
  std::unique_ptr<Backend> background_lane() override { fail("not used here"); }
  std::unique_ptr<Buffer> allocate(std::size_t bytes) override {
    return std::make_unique<HostBuffer>(bytes);
  }
  void write(void* destination, const void* source, std::size_t bytes) override {
    std::memcpy(destination, source, bytes);
  }
  void read(void* destination, const void* source, std::size_t bytes) override {
    std::memcpy(destination, source, bytes);
  }
  std::unique_ptr<PageMemory> create_page_memory(std::size_t, std::int64_t) override {
    fail("not used here");
  }
  std::size_t page_granularity() const override { return 1; }
  std::size_t packed_bytes(std::int64_t, std::int64_t, DType) const override { return 0; }
  std::int64_t pack(const PackSource&, const PackShape&, std::int64_t, void*) override {
    return -1;
  }
  std::size_t moe_scratch_bytes(const MoeConfig&, std::int64_t, std::int64_t,
                                std::int32_t) const override {
    return 0;
  }

 protected:
  void do_embed_text(const EmbedTextArgs&) override { fail("not used here"); }
  void do_embed_audio(const EmbedAudioArgs&) override { fail("not used here"); }
  void do_kv_append(const KvAppendArgs&) override { fail("not used here"); }
  void do_attention(const AttentionArgs&) override { fail("not used here"); }
  void do_conv_add_norm(const ConvAddNormArgs&) override { fail("not used here"); }
  void do_silu_mul(const SiluMulArgs&) override { fail("not used here"); }
  void do_moe(const MoeArgs&) override { fail("not used here"); }

  void do_norm(const NormArgs& args) override {
    for (std::int32_t row = 0; row < args.n_rows; ++row) {
      const float* x = args.x + row * args.x_stride;
      float* out = static_cast<float*>(args.out.data) + row * args.out.stride;
      float squares = 0;
      for (std::int32_t i = 0; i < args.width; ++i) squares += x[i] * x[i];
      const float scale = 1.0f / std::sqrt(squares / static_cast<float>(args.width) + args.eps);
      for (std::int32_t i = 0; i < args.width; ++i) {
        const float value = x[i] * scale * args.weight[i];
        out[i] = args.activation == Activation::kGelu ? gelu(value) : value;
      }
    }
  }

  void do_linear(const LinearArgs& args) override {
    const auto* w = static_cast<const float*>(args.w.data);
    for (std::int32_t row = 0; row < args.n_rows; ++row) {
      const float* x = static_cast<const float*>(args.x.data) + row * args.x.stride;
      for (std::int32_t n = 0; n < args.w.n_out; ++n) {
        float sum = 0;
        for (std::int32_t k = 0; k < args.w.n_in; ++k) sum += w[n * args.w.n_in + k] * x[k];
        args.y[row * args.y_stride + n] = sum;
      }
    }
  }

  void do_sample(const SampleArgs&) override { fail("not used here"); }
  void do_fold(const FoldArgs& args) override {
    const std::int32_t n_t = args.t / args.t_fold, n_hw = args.h / args.hw_fold;
    auto* row = static_cast<float*>(args.out.data);
    for (std::int32_t cell = 0; cell < args.n_patches * n_t * n_hw * n_hw; ++cell) {
      const std::int32_t t = cell / (n_hw * n_hw), y = cell / n_hw % n_hw, x = cell % n_hw;
      std::int32_t column = 0;
      for (std::int32_t dt = 0; dt < args.t_fold; ++dt) {
        for (std::int32_t dy = 0; dy < args.hw_fold; ++dy) {
          for (std::int32_t dx = 0; dx < args.hw_fold; ++dx) {
            const std::int64_t source =
                (std::int64_t{t * args.t_fold + dt} * args.h + y * args.hw_fold + dy) * args.w +
                x * args.hw_fold + dx;
            for (std::int32_t c = 0; c < args.c; ++c)
              row[column++] = args.x[source * args.x_stride + c];
          }
        }
      }
      std::fill(row + column, row + args.out.stride, 0.0f);
      row += args.out.stride;
    }
  }
};

// A picture of random bytes whose rows end in bytes that belong to nobody.
struct Picture {
  Picture(std::int32_t height, std::int32_t width) : row_stride(width * 3 + 5) {
    std::mt19937 random(7);
    bytes.resize(static_cast<std::size_t>(height) * static_cast<std::size_t>(row_stride));
    for (auto& byte : bytes) byte = static_cast<std::uint8_t>(random());
    view = {bytes.data(), height, width, row_stride};
  }
  std::int64_t row_stride;
  std::vector<std::uint8_t> bytes;
  ImageView view;
};

VisionConfig small_config() {
  VisionConfig config;
  config.patch_size = 4;
  config.stages = {{1, 2, 12, 20}, {1, 2, 80, 5}, {2, 1, 10, 33}};
  return config;
}

// Row-major weights of a config; columns are padded to kColumnAlign with zeros.
struct RandomWeights {
  explicit RandomWeights(const VisionConfig& config) {
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    for (const HmlpStage& stage : config.stages) {
      const auto n_in = static_cast<std::int32_t>(round_up(stage.d_in, kColumnAlign));
      std::vector<float>& w = matrices.emplace_back(static_cast<std::size_t>(stage.d_out * n_in));
      for (std::int32_t i = 0; i < stage.d_out * n_in; ++i) {
        if (i % n_in < stage.d_in) w[static_cast<std::size_t>(i)] = normal(random);
      }
      std::vector<float>& norm =
          norms.emplace_back(static_cast<std::size_t>(round_up(stage.d_out, kColumnAlign)));
      std::generate_n(norm.begin(), stage.d_out, [&] { return 1.0f + 0.1f * normal(random); });
      packed.linear.push_back({w.data(), stage.d_out, n_in, DType::kF32});
      packed.norm.push_back(norm.data());
    }
    packed.final_norm = packed.norm.back();
    packed.norm.pop_back();
  }
  std::vector<std::vector<float>> matrices;
  std::vector<std::vector<float>> norms;
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
    return patch_grid({pixel, height, width, std::int64_t{width} * 3}, 40);
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
  const std::uint8_t pixel[3] = {};
  CHECK_THROWS_AS(patch_grid({pixel, 2, 2, 5}, 40), InvalidArgument);
  CHECK_THROWS_AS(patch_grid({nullptr, 2, 2, 6}, 40), InvalidArgument);
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
            const auto at = static_cast<std::size_t>(y * picture.row_stride + x * 3 + c);
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
  CHECK_THROWS_AS(preprocess(picture.view, config, 5, 2, pixels.data()), InvalidArgument);
  CHECK_THROWS_AS(preprocess(picture.view, config, -1, 2, pixels.data()), InvalidArgument);
}

// One stage by its definition, on one patch: cells (t, h, w, c) without padding.
std::vector<float> apply_stage(const std::vector<float>& cells, std::int32_t h, std::int32_t c,
                               const HmlpStage& stage, const PackedMatrix& w, const float* norm,
                               bool is_last) {
  const std::int32_t frames = static_cast<std::int32_t>(cells.size()) / (h * h * c);
  const auto* weights = static_cast<const float*>(w.data);
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
            sum += static_cast<double>(weights[n * w.n_in + k]) *
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
  const RandomWeights weights(config);
  PlainBackend backend;
  HmlpEncoder encoder(config, weights.packed, backend, 6);
  const Picture picture(6, 8);
  const std::vector<float> found = encode(encoder, picture.view, 0, 6);
  for (std::int64_t patch = 0; patch < 6; ++patch) {
    std::vector<float> cells(2 * 4 * 4 * 3);
    preprocess(picture.view, config, patch, 1, cells.data());
    cells = apply_stage(cells, 4, 3, config.stages[0], weights.packed.linear[0],
                        weights.packed.norm[0], false);
    cells = apply_stage(cells, 2, 20, config.stages[1], weights.packed.linear[1],
                        weights.packed.norm[1], false);
    cells = apply_stage(cells, 1, 5, config.stages[2], weights.packed.linear[2],
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
  const RandomWeights weights(config);
  PlainBackend backend;
  HmlpEncoder large(config, weights.packed, backend, 64);
  HmlpEncoder small(config, weights.packed, backend, 4);
  const Picture picture(17, 21);  // 5 rows of 6 patches
  const std::vector<float> expected = encode(large, picture.view, 0, 30);
  CHECK(encode(small, picture.view, 0, 30) == expected);
  const std::vector<float> middle = encode(small, picture.view, 11, 9);
  CHECK(std::equal(middle.begin(), middle.end(), expected.begin() + 11 * 48));
}

TEST_CASE("hmlp: shapes that do not fit together are refused", "[encoders]") {
  const VisionConfig config = small_config();
  const RandomWeights weights(config);
  PlainBackend backend;
  const auto build = [&](const VisionConfig& vision, const HmlpWeights& packed) {
    HmlpEncoder(vision, packed, backend, 1);
  };
  CHECK_NOTHROW(build(config, weights.packed));
  VisionConfig wrong = config;
  wrong.patch_size = 8;  // the stages leave 2x2 cells
  CHECK_THROWS_AS(build(wrong, weights.packed), InvalidArgument);
  wrong = config;
  wrong.stages[1].d_in = 79;
  CHECK_THROWS_WITH(build(wrong, weights.packed), Catch::Contains("stage 1"));
  const auto refuses = [&](auto spoil, const char* says) {
    VisionConfig vision = config;
    spoil(vision);
    CHECK_THROWS_WITH(build(vision, weights.packed), Catch::Contains(says));
  };
  refuses([](VisionConfig& v) { v.n_channels = 4; }, "n_channels: expected 3");
  refuses([](VisionConfig& v) { v.patch_size += 1; }, "stage 0: expected folds that divide");
  refuses([](VisionConfig& v) { v.temporal_patch_size *= 2; }, "fold a patch into one cell");
  refuses([](VisionConfig& v) { v.stages.back().d_out = 0; }, "a positive d_out");
  refuses([](VisionConfig& v) { v.stages.clear(); }, "after the last of 0");
  HmlpWeights missing = weights.packed;
  missing.norm.pop_back();
  CHECK_THROWS_AS(build(config, missing), InvalidArgument);
  HmlpWeights swapped = weights.packed;
  std::swap(swapped.linear[0], swapped.linear[2]);
  CHECK_THROWS_WITH(build(config, swapped), Catch::Contains("linear_0"));
}

}  // namespace
}  // namespace duplex
