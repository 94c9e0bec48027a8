// The choice of tokens by the CUDA backend against the CPU backend's: the same ids, always.
#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/simt/fixtures.h"

namespace duplex::simt_tests {
namespace {

struct Choices {
  std::int32_t n_vocab;
  std::int64_t stride;
  std::vector<float> logits;
  std::vector<SampleRow> rows;

  std::vector<std::int32_t> run(Backend& backend) const {
    Memory memory(backend);
    std::vector<std::int32_t> tokens(rows.size(), -1);
    backend.sample({memory.put(logits), stride, n_vocab, static_cast<std::int32_t>(rows.size()),
                    rows.data(), tokens.data()});
    return tokens;
  }
};

void check_same_tokens(const Choices& scene) {
  CpuBackend cpu({1, ""});
  const std::vector<std::int32_t> expected = scene.run(cpu);
  for (const std::int32_t token : expected) REQUIRE((token >= 0 && token < scene.n_vocab));
  in_every_order([&](Backend& backend) { CHECK(scene.run(backend) == expected); });
}

std::vector<SamplingParams> ways(std::int32_t n_vocab) {
  return {{1, 0.0f, 0, 1.0f},
          {2, 1.0f, 0, 1.0f},
          {3, 0.3f, 0, 1.0f},
          {4, 1e-40f, 0, 1.0f},
          {~std::uint64_t{0}, 1.5f, 1, 1.0f},
          {6, 1.5f, std::max(n_vocab / 3, 1), 1.0f},
          {7, 2.0f, n_vocab + 5, 0.9f},
          {8, 2.0f, 0, 0.5f},
          {9, 1.0f, 0, 1e-30f},
          {10, 1.5f, std::max(n_vocab / 2, 1), 0.7f},
          {11, 1e30f, std::max(n_vocab - 1, 1), 0.99f}};
}

// A row of the same logits for each.
Choices scene_of(const std::vector<float>& logits, std::vector<SampleRow> rows) {
  const auto n_vocab = static_cast<std::int32_t>(logits.size());
  Choices scene{n_vocab, round_up(n_vocab, kColumnAlign) + 16, {}, std::move(rows)};
  const auto stride = static_cast<std::size_t>(scene.stride);
  const float best = *std::max_element(logits.begin(), logits.end());
  // Behind a row, and never chosen: a little better than the best of it.
  scene.logits.assign(scene.rows.size() * stride, std::nextafter(best, 1e30f));
  for (std::size_t row = 0; row < scene.rows.size(); ++row)
    std::copy(logits.begin(), logits.end(),
              scene.logits.begin() + static_cast<std::ptrdiff_t>(row * stride));
  return scene;
}

// Every way, each at several positions.
Choices scene_of(const std::vector<float>& logits, int n_positions) {
  std::vector<SampleRow> rows;
  for (int position = 0; position < n_positions; ++position)
    for (const SamplingParams& params : ways(static_cast<std::int32_t>(logits.size())))
      rows.push_back({params, 1000 * position});
  return scene_of(logits, std::move(rows));
}

std::vector<float> random_logits(int n, float scale, std::uint32_t seed) {
  Random random(seed);
  std::vector<float> logits(static_cast<std::size_t>(n));
  for (float& logit : logits) logit = scale * random.normal();
  return logits;
}

TEST_CASE("cuda: sample, as the CPU chooses", "[simt][sample]") {
  const int n_vocab = GENERATE(1, 2, 3, 31, 33, 296, 5003);
  CAPTURE(n_vocab);
  check_same_tokens(scene_of(random_logits(n_vocab, 3, 3), n_vocab > 1000 ? 1 : 3));
}

TEST_CASE("cuda: sample, where many logits are equal", "[simt][sample]") {
  const int kind = GENERATE(0, 1, 2, 3, 4);
  CAPTURE(kind);
  Random random(4);
  const float inf = std::numeric_limits<float>::infinity();
  const float few[] = {0.0f, -0.0f, 1.5f, 1.5f, -2.0f};
  std::vector<float> logits(1500);
  for (std::size_t i = 0; i < logits.size(); ++i)
    logits[i] = kind == 0   ? 0.25f
                : kind == 1 ? few[static_cast<std::size_t>(std::abs(random.normal()) * 100) % 5]
                : kind == 2 ? (i % 7 == 0   ? NAN
                               : i % 3 == 0 ? -inf
                                            : random.normal())
                : kind == 3 ? (i % 5 == 4 ? inf : 0.5f)
                            : NAN;
  check_same_tokens(scene_of(logits, 2));
}

// What a filter keeps has no room in shared memory: among distinct logits, and where the filter
// ends in the middle of equal ones. The second filter then has the same row before it.
TEST_CASE("cuda: sample, where more is kept than can be listed", "[simt][sample]") {
  const bool has_few = GENERATE(false, true);
  CAPTURE(has_few);
  std::vector<float> logits = random_logits(30'000, 1, 5);
  if (has_few)
    for (float& logit : logits) logit = std::round(logit);
  check_same_tokens(scene_of(logits, {{{1, 1.0f, 0, 0.97f}, 17},
                                      {{2, 1.5f, 12'000, 1.0f}, 18},
                                      {{3, 2.0f, 25'000, 0.9f}, 19},
                                      {{4, 3.0f, 20'000, 0.999f}, 20},
                                      {{5, 0.5f, 0, 0.5f}, 21}}));
}

// Ids and ranks in the last bins, which are not whole. Of the most ids one more than can be listed
// is no worse than -7.
TEST_CASE("cuda: sample, the last of the ids and of the ranks", "[simt][sample]") {
  const std::int32_t n_vocab = GENERATE(1025, 3001, 2 * 8192 + 1);
  CAPTURE(n_vocab);
  std::vector<float> logits(static_cast<std::size_t>(n_vocab));
  for (std::int32_t id = 0; id < n_vocab; ++id)
    logits[static_cast<std::size_t>(id)] = id == n_vocab - 1 ? 0.0f : id % 2 == 0 ? -7.0f : -7.3f;
  std::vector<SampleRow> rows;
  for (const std::int32_t top_k : {0, 2, n_vocab / 2 - 1, n_vocab - 1})
    for (const float top_p : {0.01f, 0.9999f, 1.0f}) rows.push_back({{1, 1.0f, top_k, top_p}, 3});
  check_same_tokens(scene_of(logits, std::move(rows)));
}

// Quotients of all sizes, with a division by the temperature and with its reciprocal.
TEST_CASE("cuda: sample, at any temperature", "[simt][sample]") {
  const float scale = GENERATE(1e-38f, 1e-30f, 1e-6f, 1.0f, 1e30f);
  CAPTURE(scale);
  std::vector<SampleRow> rows;
  for (const float of : {1e-8f, 0.1f, 0.77f, 1.0f, 1e7f})
    for (const float top_p : {0.5f, 0.9f}) rows.push_back({{7, of * scale, 700, top_p}, 3});
  check_same_tokens(scene_of(random_logits(900, scale, 6), std::move(rows)));
}

TEST_CASE("cuda: sample, from a large vocabulary", "[simt][sample][races]") {
  check_same_tokens(scene_of(random_logits(200'058, 3, 7), {{{1, 0.0f, 0, 1.0f}, 1},
                                                            {{2, 1.0f, 0, 1.0f}, 17},
                                                            {{3, 1.0f, 0, 0.95f}, 18},
                                                            {{4, 1.0f, 50, 0.9f}, 19}}));
}

}  // namespace
}  // namespace duplex::simt_tests
