// The choice of tokens on the CPU against a sorted reference: which ids may come, how often they
// do, and that a draw depends on nothing but logits, parameters and position. And its arithmetic.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <limits>
#include <map>
#include <random>

#include "backend/cpu/cpu_backend.h"
#include "core/error.h"

namespace duplex {
namespace {

// The sampler of one vocabulary, as the model calls it.
class Sampler {
 public:
  explicit Sampler(std::int32_t n_vocab) : n_vocab_(n_vocab) {}
  std::int32_t sample(const float* logits, const SamplingParams& params, std::int64_t position) {
    const SampleRow row{params, position};
    std::int32_t token = -1;
    backend_.sample({logits, round_up(n_vocab_, kColumnAlign), n_vocab_, 1, &row, &token});
    return token;
  }

 private:
  CpuBackend backend_{BackendOptions{.n_threads = 1, .isa = ""}};
  std::int32_t n_vocab_;
};

std::vector<float> random_logits(std::size_t n, std::uint32_t seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0f, 2.0f);
  std::vector<float> logits(n);
  for (float& logit : logits) logit = normal(engine);
  return logits;
}

// Probability of every id that may come: sort, keep the k best, keep the smallest set of them that
// holds top_p of their mass.
std::map<std::int32_t, double> reference(const std::vector<float>& logits,
                                         const SamplingParams& params) {
  std::vector<std::int32_t> ids(logits.size());
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int32_t>(i);
  const auto logit = [&](std::int32_t id) { return logits[static_cast<std::size_t>(id)]; };
  std::stable_sort(ids.begin(), ids.end(), [&](auto a, auto b) { return logit(a) > logit(b); });
  if (params.top_k > 0) ids.resize(std::min(ids.size(), static_cast<std::size_t>(params.top_k)));
  const auto weight = [&](std::int32_t id) {
    return std::exp((double{logit(id)} - logit(ids[0])) / double{params.temperature});
  };
  double total = 0, kept = 0;
  for (const std::int32_t id : ids) total += weight(id);
  std::map<std::int32_t, double> probabilities;
  for (const std::int32_t id : ids) {
    if (!probabilities.empty() && kept >= double{params.top_p} * total) break;
    probabilities[id] = weight(id);
    kept += weight(id);
  }
  for (auto& [id, probability] : probabilities) probability /= kept;
  return probabilities;
}

// Draws at positions 0, 1, ... and compares the counts with the reference.
void check_draws(const std::vector<float>& logits, const SamplingParams& params) {
  constexpr int kDraws = 3000;
  const std::map<std::int32_t, double> expected = reference(logits, params);
  Sampler sampler(static_cast<std::int32_t>(logits.size()));
  std::map<std::int32_t, int> counts;
  for (int position = 0; position < kDraws; ++position)
    ++counts[sampler.sample(logits.data(), params, position)];
  int n_outside = 0;
  for (const auto& [id, count] : counts) n_outside += expected.contains(id) ? 0 : count;
  CHECK(n_outside == 0);
  // Pearson's statistic has mean df and variance about 2 df; six deviations pass. Rare ids share
  // one cell, so that every cell expects at least five.
  double statistic = 0, rare = 0, rare_count = 0;
  int n_cells = 0;
  const auto add_cell = [&](double n_expected, double n_found) {
    statistic += (n_found - n_expected) * (n_found - n_expected) / n_expected;
    ++n_cells;
  };
  for (const auto& [id, probability] : expected) {
    if (probability * kDraws >= 5) {
      add_cell(probability * kDraws, counts[id]);
    } else {
      rare += probability * kDraws;
      rare_count += counts[id];
    }
  }
  if (rare >= 5) add_cell(rare, rare_count);
  const double df = n_cells - 1;
  CHECK(statistic <= df + 6 * std::sqrt(2 * df) + 1e-9);
}

TEST_CASE("greedy takes the largest logit, the lower id on a tie") {
  Sampler sampler(5);
  const SamplingParams greedy;
  const auto best = [&](std::vector<float> logits) {
    return sampler.sample(logits.data(), greedy, 0);
  };
  CHECK(best({1, 5, 2, 5, 5}) == 1);
  CHECK(best({0, 0, 0, 0, 0}) == 0);
  CHECK(best({-3, -2, -1, -1, -9}) == 2);
  CHECK(best({-0.0f, 0.0f, -1, -1, -1}) == 0);
}

TEST_CASE("draws follow the softmax of what top-k and top-p keep") {
  const auto n_vocab = static_cast<std::size_t>(GENERATE(7, 400));
  const std::int32_t top_k = GENERATE(0, 1, 5, 70, 5000);
  const float top_p = GENERATE(1.0f, 0.9f, 0.3f, 1e-6f);
  const float temperature = GENERATE(0.5f, 3.0f);
  CAPTURE(n_vocab, top_k, top_p, temperature);
  check_draws(random_logits(n_vocab, 1), {7, temperature, top_k, top_p});
}

TEST_CASE("ties at the edge of top-k and top-p keep the lower ids") {
  const std::vector<float> flat(300, 0.25f);
  Sampler sampler(300);
  std::int32_t largest_k = 0, largest_p = 0;
  for (int position = 0; position < 3000; ++position) {
    largest_k = std::max(largest_k, sampler.sample(flat.data(), {3, 1.0f, 100, 1.0f}, position));
    largest_p = std::max(largest_p, sampler.sample(flat.data(), {3, 1.0f, 0, 0.5f}, position));
  }
  CHECK(largest_k == 99);
  CHECK(largest_p == 149);
}

TEST_CASE("a draw is a function of logits, parameters and position alone") {
  const std::vector<float> logits = random_logits(50, 2);
  const std::vector<float> others = random_logits(50, 3);
  const SamplingParams params{11, 1.5f, 20, 0.95f};
  Sampler first(50), second(50);
  int n_moved = 0, n_reseeded = 0;
  for (int position = 0; position < 200; ++position) {
    const std::int32_t id = first.sample(logits.data(), params, position);
    second.sample(others.data(), {1, 0.7f, 3, 0.5f}, 9);  // leaves nothing behind
    CHECK(second.sample(logits.data(), params, position) == id);
    n_moved += first.sample(logits.data(), params, position + 1) != id ? 1 : 0;
    n_reseeded += first.sample(logits.data(), {12, 1.5f, 20, 0.95f}, position) != id ? 1 : 0;
  }
  CHECK(n_moved > 50);
  CHECK(n_reseeded > 50);
}

TEST_CASE("one candidate is no choice") {
  const std::vector<float> logits = random_logits(64, 4);
  const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
  Sampler sampler(64);
  for (int position = 0; position < 20; ++position) {
    CHECK(sampler.sample(logits.data(), {5, 2.0f, 1, 1.0f}, position) == best);
    CHECK(sampler.sample(logits.data(), {5, 2.0f, 0, 1e-30f}, position) == best);
  }
}

// Where the temperature vanishes, and where logits divided by it leave the range of float32.
TEST_CASE("the lowest temperatures are greedy") {
  const std::vector<float> logits = {-4.0f, 9.0f, 30.0f, 29.0f, -20.0f};
  const float temperature =
      GENERATE(1e-3f, 1e-20f, 1e-38f, std::numeric_limits<float>::denorm_min());
  const float top_p = GENERATE(1.0f, 0.9f);
  const std::int32_t top_k = GENERATE(0, 3);
  CAPTURE(temperature, top_p, top_k);
  Sampler sampler(5);
  for (int position = 0; position < 20; ++position)
    CHECK(sampler.sample(logits.data(), {6, temperature, top_k, top_p}, position) == 2);
}

TEST_CASE("what is no number is never drawn, if anything else is there") {
  const float inf = std::numeric_limits<float>::infinity();
  Sampler sampler(6);
  const auto choose = [&](std::vector<float> logits, SamplingParams params) {
    return sampler.sample(logits.data(), params, 3);
  };
  for (const SamplingParams& params : {SamplingParams{},
                                       {1, 0.7f, 0, 1.0f},
                                       {2, 0.7f, 3, 1.0f},
                                       {3, 0.7f, 0, 0.8f},
                                       {4, 0.7f, 5, 0.5f}}) {
    CHECK(choose({NAN, -inf, NAN, 1, -inf, NAN}, params) == 3);
    CHECK(choose({NAN, -inf, NAN, inf, 7, NAN}, params) == 3);
    CHECK(choose({NAN, NAN, NAN, NAN, NAN, NAN}, params) == 0);
    const std::int32_t id = choose({-inf, -inf, -inf, -inf, -inf, -inf}, params);
    CHECK((id >= 0 && id < 6));
  }
}

TEST_CASE("rows are sampled one by one, each its own way") {
  constexpr std::int32_t kVocab = 90, kStride = 96, kRows = 4;
  const std::vector<float> logits = random_logits(kRows * kStride, 5);
  std::vector<SampleRow> rows;
  for (int i = 0; i < kRows; ++i)
    rows.push_back({{static_cast<std::uint64_t>(i), 0.5f * static_cast<float>(i), i, 1.0f}, 7 * i});
  std::vector<std::int32_t> tokens(kRows, -1);
  CpuBackend backend({1, ""});
  backend.sample({logits.data(), kStride, kVocab, kRows, rows.data(), tokens.data()});
  Sampler sampler(kVocab);
  for (std::size_t i = 0; i < kRows; ++i)
    CHECK(tokens[i] ==
          sampler.sample(logits.data() + i * kStride, rows[i].params, rows[i].position));
}

// ---- the arithmetic

TEST_CASE("a weight is exp to a few units of float32") {
  const auto rank_of = [](float x) { return sampling_rank(x, 0.0f, 1.0f); };
  CHECK(sampling_weight(rank_of(0.0f)) == std::uint64_t{1} << kWeightBits);
  CHECK(sampling_weight(rank_of(-28.5f)) == 0);
  CHECK(sampling_weight(rank_of(-INFINITY)) == 0);
  CHECK(sampling_weight(rank_of(NAN)) == 0);
  double worst = 0;
  for (float x = -27.0f; x < 0.0f; x += 0.0007f) {
    const double expected = std::ldexp(std::exp(double{x}), kWeightBits);
    const double found = static_cast<double>(sampling_weight(rank_of(x)));
    worst = std::max(worst, (std::abs(found - expected) - 1) / expected);
  }
  CHECK(worst < 4 * 0x1p-24);
}

TEST_CASE("a rank orders logits as they are ordered") {
  CHECK(sampling_rank(2.0f, 2.0f, 0.1f) == kBestRank);
  std::uint32_t before = kBestRank;
  for (const float logit : {1.999f, 1.9f, 0.0f, -5.0f, -1e30f, -INFINITY}) {
    const std::uint32_t rank = sampling_rank(logit, 2.0f, 0.1f);
    CHECK(rank < before);
    before = rank;
  }
  CHECK(sampling_rank(NAN, 2.0f, 0.1f) < before);
}

TEST_CASE("a share is the upper half of a product") {
  std::mt19937_64 random(3);
  for (int i = 0; i < 1000; ++i) {
    const std::uint64_t a = random() >> (random() % 64), b = random() >> (random() % 64);
    __extension__ using Wide = unsigned __int128;
    CHECK(share_of(a, b) == static_cast<std::uint64_t>(Wide{a} * b >> 64));
  }
  CHECK(share_of(~std::uint64_t{0}, ~std::uint64_t{0}) == ~std::uint64_t{0} - 1);
  CHECK(wanted_mass(0.5f, 1000) == 500);
  CHECK(wanted_mass(1e-30f, 1000) == 1);
}

TEST_CASE("sampling parameters are checked by name") {
  const auto problem = [](SamplingParams params) {
    try {
      params.validate();
    } catch (const InvalidArgument& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  CHECK(problem({}) == "");
  CHECK(problem({1, 2.0f, 5, 0.5f}) == "");
  CHECK_THAT(problem({0, -1.0f, 0, 1.0f}), Catch::StartsWith("temperature:"));
  CHECK_THAT(problem({0, NAN, 0, 1.0f}), Catch::StartsWith("temperature:"));
  CHECK_THAT(problem({0, INFINITY, 0, 1.0f}), Catch::StartsWith("temperature:"));
  CHECK_THAT(problem({0, 1.0f, -1, 1.0f}), Catch::StartsWith("top_k:"));
  CHECK_THAT(problem({0, 1.0f, 0, 0.0f}), Catch::StartsWith("top_p:"));
  CHECK_THAT(problem({0, 1.0f, 0, 1.5f}), Catch::StartsWith("top_p:"));
  CHECK_THAT(problem({0, 1.0f, 0, NAN}), Catch::StartsWith("top_p:"));
}

}  // namespace
}  // namespace duplex
