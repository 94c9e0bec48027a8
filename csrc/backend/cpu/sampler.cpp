#include "backend/cpu/sampler.h"

#include <algorithm>
#include <limits>

namespace duplex {

std::int32_t Sampler::sample(const float* logits, std::int32_t n_vocab, const SampleRow& row) {
  float best = -std::numeric_limits<float>::infinity();
  std::int32_t best_id = 0;
  for (std::int32_t id = 0; id < n_vocab; ++id)
    if (logits[id] > best) {
      best = logits[id];
      best_id = id;
    }
  const SamplingParams& params = row.params;
  if (params.temperature == 0.0f) return best_id;
  candidates_.resize(static_cast<std::size_t>(n_vocab));
  weights_.resize(static_cast<std::size_t>(n_vocab));
  std::uint64_t total = 0;
  for (std::int32_t id = 0; id < n_vocab; ++id) {
    const std::uint32_t rank = sampling_rank(logits[id], best, params.temperature);
    candidates_[static_cast<std::size_t>(id)] = {rank, id};
    total += weights_[static_cast<std::size_t>(id)] = sampling_weight(rank);
  }
  if (total == 0) return best_id;  // no logit is a number
  std::size_t n = candidates_.size();
  if (params.top_k > 0 && params.top_k < n_vocab) n = keep_top_k(params.top_k);
  if (params.top_p < 1.0f) n = keep_top_p(n, params.top_p);
  return draw(n, row);
}

std::size_t Sampler::keep_top_k(std::int32_t k) {
  std::nth_element(candidates_.begin(), candidates_.begin() + k, candidates_.end(), is_better);
  return static_cast<std::size_t>(k);
}

// The fewest of the best candidates that reach the mass. Halves the range in question and looks at
// the mass of the better half: no order inside the halves is needed, so the whole costs a few reads
// of the vocabulary.
std::size_t Sampler::keep_top_p(std::size_t n, float top_p) {
  const std::uint64_t wanted = wanted_mass(top_p, mass(0, n));
  std::size_t low = 0;  // candidates before it are kept, and fall short
  std::size_t high = n;
  std::uint64_t kept = 0;
  while (high - low > 1) {
    const std::size_t middle = low + (high - low) / 2;
    const auto begin = candidates_.begin();
    std::nth_element(begin + static_cast<std::ptrdiff_t>(low),
                     begin + static_cast<std::ptrdiff_t>(middle),
                     begin + static_cast<std::ptrdiff_t>(high), is_better);
    const std::uint64_t better = mass(low, middle);
    if (kept + better >= wanted) {
      high = middle;
    } else {
      kept += better;
      low = middle;
    }
  }
  return low + 1;
}

std::uint64_t Sampler::mass(std::size_t begin, std::size_t end) const {
  std::uint64_t sum = 0;
  for (std::size_t i = begin; i < end; ++i)
    sum += weights_[static_cast<std::size_t>(candidates_[i].id)];
  return sum;
}

std::int32_t Sampler::draw(std::size_t n, const SampleRow& row) {
  const auto begin = candidates_.begin();
  const auto end = begin + static_cast<std::ptrdiff_t>(n);
  // Selections leave an arbitrary order behind, even where they keep all; ids give a fixed one.
  if (n == candidates_.size()) {
    for (std::size_t i = 0; i < n; ++i) candidates_[i].id = static_cast<std::int32_t>(i);
  } else {
    std::sort(begin, end, [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
  }
  std::uint64_t left = share_of(random_bits(row.params.seed, row.position), mass(0, n));
  for (auto c = begin; c != end; ++c) {
    const std::uint64_t weight = weights_[static_cast<std::size_t>(c->id)];
    if (left < weight) return c->id;
    left -= weight;
  }
  return (end - 1)->id;
}

}  // namespace duplex
