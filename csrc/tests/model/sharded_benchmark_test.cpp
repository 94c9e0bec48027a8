// What parts cost a single rank: duplex_tests "[!benchmark]". No pass or fail. The shapes are those
// of bench/shapes.py with fewer layers; the head, which parts do not touch, is left out.
#include <algorithm>
#include <catch2/catch.hpp>
#include <chrono>
#include <cstdio>

#include "backend/cpu/cpu_backend.h"
#include "model/inkling.h"
#include "sequence/sequence.h"
#include "tests/model/checkpoint.h"

namespace duplex::model_tests {
namespace {

constexpr std::int32_t kMaxRows = 256, kContext = 1024;
constexpr RowLimits kLimits{0, 2 * kMaxRows};

ModelConfig shape(std::int32_t d_model, std::int32_t d_ff, std::int32_t n_heads,
                  std::int32_t n_kv_heads, std::int32_t d_head, std::size_t n_layers) {
  ModelConfig config;
  config.vocab_size = config.unpadded_vocab_size = 64;
  config.d_model = d_model;
  config.d_rel = 16;
  config.d_ff = d_ff;
  config.global = config.local = {n_heads, n_kv_heads, d_head, 1024, 0};
  config.local.window = 512;
  config.layers.assign(n_layers, {false, false});
  return config;
}

ModelConfig experts_shape() {
  ModelConfig config = shape(1024, 0, 16, 4, 128, 2);
  config.layers.assign(2, {true, true});
  config.moe = {64, 2, 6, 512, 1.0f};
  return config;
}

// A model in so many parts, behind kContext rows; run() appends rows again and again.
class Model {
 public:
  Model(const ModelConfig& config, std::vector<OwnTensor>& tensors, DType matrices,
        std::int32_t n_parts)
      : config_(shard_config(config, {0, 1, n_parts})),
        layout_(SequenceLayout::make(config_, DType::kBF16, 4096, kLimits)),
        pool_(backend_.create_page_memory(
            layout_.page_bytes, 3 * layout_.growth_pages(2048) + 3 * layout_.window_pages())),
        sequence_(Sequence::open(pool_, layout_, 2048)) {
    weights_ = load_weights(config, views(tensors), {DType::kBF16, matrices}, backend_, {},
                            {0, 1, n_parts});
    model_.emplace(config_, weights_, layout_, backend_, kMaxRows);
    std::int32_t value = 0;
    for (std::int64_t i = 0; i < kMaxRows * model_->row_stride(); ++i)
      if (i % model_->row_stride() < config.d_model)
        model_->rows()[i] = static_cast<float>((value = (value * 421 + 77) % 997) - 498) * 0.003f;
    rows_.assign(model_->rows(), model_->rows() + kMaxRows * model_->row_stride());
    for (std::int32_t n = 0; n < kContext; n += kMaxRows) {
      run(kMaxRows);
      sequence_.advance(kMaxRows);
      sequence_.commit();
    }
  }
  double run(std::int32_t n_rows) {
    sequence_.reserve(n_rows);
    std::copy(rows_.begin(), rows_.end(), model_->rows());
    const Segment segment = sequence_.segment(0, n_rows);
    std::chrono::duration<double, std::micro> time{};
    backend_.run_awake([&] {
      const auto start = std::chrono::steady_clock::now();
      model_->forward({&segment, 1, n_rows});
      time = std::chrono::steady_clock::now() - start;
    });
    return time.count();
  }

 private:
  CpuBackend backend_{{0, ""}};
  ModelConfig config_;
  SequenceLayout layout_;
  PagePool pool_;
  Sequence sequence_;
  Weights weights_;
  std::optional<Inkling> model_;
  std::vector<float> rows_;
};

void measure(const char* name, const ModelConfig& config, DType matrices, int n_rounds) {
  std::vector<OwnTensor> tensors = RandomCheckpoint(config, 1).tensors();
  std::vector<std::int32_t> parts;
  for (std::int32_t n = 1; n <= virtual_shards(config, matrices); n *= 2) parts.push_back(n);
  std::vector<std::unique_ptr<Model>> models;
  for (const std::int32_t n : parts)
    models.push_back(std::make_unique<Model>(config, tensors, matrices, n));
  tensors.clear();
  for (const std::int32_t n_rows : {1, 20}) {
    std::vector<std::vector<double>> times(models.size());
    for (int round = 0; round < n_rounds; ++round)  // in turns: a noisy moment hits all
      for (std::size_t i = 0; i < models.size(); ++i) times[i].push_back(models[i]->run(n_rows));
    std::printf("%-14s %2d rows:", name, n_rows);
    double whole = 0;
    for (std::size_t i = 0; i < models.size(); ++i) {
      std::sort(times[i].begin(), times[i].end());
      const double median = times[i][times[i].size() / 2];
      if (i == 0) whole = median;
      std::printf("  %d parts %.0f (%.3f)", parts[i], median, median / whole);
    }
    std::printf("\n");
  }
}

TEST_CASE("one rank in parts", "[!benchmark]") {
  std::printf("a pass behind %d rows, us: median (ratio to one part)\n", kContext);
  measure("S bfloat16", shape(512, 1408, 8, 4, 64, 8), DType::kBF16, 200);
  measure("M bfloat16", shape(1024, 3072, 16, 8, 128, 6), DType::kBF16, 100);
  measure("M int8", shape(1024, 3072, 16, 8, 128, 6), DType::kInt8, 100);
  measure("experts", experts_shape(), DType::kBF16, 100);
}

}  // namespace
}  // namespace duplex::model_tests
