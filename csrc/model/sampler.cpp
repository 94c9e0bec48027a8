#include "model/sampler.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace duplex {
namespace {

// splitmix64: one well-mixed number for each (seed, position).
double uniform(std::uint64_t seed, std::int64_t position) {
  std::uint64_t z = seed + 0x9e3779b97f4a7c15u * (static_cast<std::uint64_t>(position) + 1);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1.0p-53;
}

// Larger logit first, lower id on a tie: a total order, so selections are reproducible.
bool is_better(const std::pair<float, std::int32_t>& a, const std::pair<float, std::int32_t>& b) {
  return a.first != b.first ? a.first > b.first : a.second < b.second;
}

}  // namespace

void SamplingParams::validate() const {
  check(std::isfinite(temperature) && temperature >= 0, "temperature: expected 0 or more, found ",
        temperature);
  check(top_k >= 0, "top_k: expected 0 (all) or more, found ", top_k);
  check(top_p > 0 && top_p <= 1, "top_p: expected a number in (0, 1], found ", top_p);
}

Sampler::Sampler(std::int32_t vocab_size)
    : candidates_(static_cast<std::size_t>(vocab_size)),
      weights_(static_cast<std::size_t>(vocab_size)) {}

std::int32_t Sampler::sample(const float* logits, const SamplingParams& params,
                             std::int64_t position) {
  const auto n_vocab = static_cast<std::int32_t>(candidates_.size());
  if (params.temperature == 0.0f)
    return static_cast<std::int32_t>(std::max_element(logits, logits + n_vocab) - logits);
  // Measured from the best, a tiny temperature gives 0 and -infinity, and never a NaN.
  const float best = *std::max_element(logits, logits + n_vocab);
  for (std::int32_t id = 0; id < n_vocab; ++id) {
    const float logit = (logits[id] - best) / params.temperature;
    candidates_[static_cast<std::size_t>(id)] = {logit, id};
    weights_[static_cast<std::size_t>(id)] = std::exp(double{logit});
  }
  std::size_t n = candidates_.size();
  if (params.top_k > 0 && params.top_k < n_vocab) n = keep_top_k(params.top_k);
  if (params.top_p < 1.0f) n = keep_top_p(n, params);
  return draw(n, params, position);
}

std::size_t Sampler::keep_top_k(std::int32_t k) {
  std::nth_element(candidates_.begin(), candidates_.begin() + k, candidates_.end(), is_better);
  return static_cast<std::size_t>(k);
}

// The fewest of the best candidates that reach the mass. Halves the range in question and looks at
// the mass of the better half: no order inside the halves is needed, so the whole costs a few reads
// of the vocabulary.
std::size_t Sampler::keep_top_p(std::size_t n, const SamplingParams& params) {
  const double wanted = static_cast<double>(params.top_p) * mass(0, n);
  std::size_t low = 0;  // candidates before it are kept, and fall short
  std::size_t high = n;
  double kept = 0;
  while (high - low > 1) {
    const std::size_t middle = low + (high - low) / 2;
    const auto begin = candidates_.begin();
    std::nth_element(begin + static_cast<std::ptrdiff_t>(low),
                     begin + static_cast<std::ptrdiff_t>(middle),
                     begin + static_cast<std::ptrdiff_t>(high), is_better);
    const double better = mass(low, middle);
    if (kept + better >= wanted) {
      high = middle;
    } else {
      kept += better;
      low = middle;
    }
  }
  return low + 1;
}

double Sampler::mass(std::size_t begin, std::size_t end) const {
  double sum = 0;
  for (std::size_t i = begin; i < end; ++i) sum += weight(candidates_[i]);
  return sum;
}

std::int32_t Sampler::draw(std::size_t n, const SamplingParams& params, std::int64_t position) {
  const auto begin = candidates_.begin();
  const auto end = begin + static_cast<std::ptrdiff_t>(n);
  // Selections leave an arbitrary order behind; ids give a fixed one.
  if (n < candidates_.size())
    std::sort(begin, end,
              [](const Candidate& a, const Candidate& b) { return a.second < b.second; });
  double target = uniform(params.seed, position) * mass(0, n);
  for (auto c = begin; c != end; ++c) {
    target -= weight(*c);
    if (target < 0) return c->second;
  }
  return (end - 1)->second;
}

}  // namespace duplex
