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
          {10, 1.5f, std::max(n_vocab / 2, 1), 0.7f}};
}

// Every way for one row of logits, each at several positions.
Choices scene_of(const std::vector<float>& logits, int n_positions) {
  const auto n_vocab = static_cast<std::int32_t>(logits.size());
  Choices scene{n_vocab, n_vocab + 3, {}, {}};
  for (int position = 0; position < n_positions; ++position)
    for (const SamplingParams& params : ways(n_vocab)) {
      scene.rows.push_back({params, 1000 * position});
      scene.logits.insert(scene.logits.end(), logits.begin(), logits.end());
      scene.logits.insert(scene.logits.end(), 3, 1e30f);  // behind the row: never chosen
    }
  return scene;
}

TEST_CASE("cuda: sample, as the CPU chooses", "[simt][sample]") {
  const int n_vocab = GENERATE(1, 2, 31, 33, 296, 5003);
  CAPTURE(n_vocab);
  Random random(3);
  std::vector<float> logits(static_cast<std::size_t>(n_vocab));
  for (float& logit : logits) logit = 3 * random.normal();
  check_same_tokens(scene_of(logits, n_vocab > 1000 ? 1 : 3));
}

TEST_CASE("cuda: sample, where many logits are equal", "[simt][sample]") {
  const int kind = GENERATE(0, 1, 2, 3);
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
                            : NAN;
  check_same_tokens(scene_of(logits, 2));
}

// More ids than the threads of a block settle in one round.
TEST_CASE("cuda: sample, from a large vocabulary", "[simt][sample]") {
  Random random(5);
  std::vector<float> logits(70'001);
  for (float& logit : logits) logit = random.normal();
  Choices scene{70'001, 70'001, logits, {{{3, 1.0f, 0, 1.0f}, 17}}};
  check_same_tokens(scene);
  scene.rows[0] = {{4, 1.0f, 0, 0.95f}, 18};
  check_same_tokens(scene);
}

}  // namespace
}  // namespace duplex::simt_tests
