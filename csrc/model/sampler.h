// From logits to a token. A draw is a pure function of (logits, parameters, position), so that a
// stream gives the same tokens however it was cut, rewound or batched.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace duplex {

struct SamplingParams {
  std::uint64_t seed = 0;
  float temperature = 0.0f;  // 0 = greedy: the largest logit, the lower id on a tie
  std::int32_t top_k = 0;    // 0 = all
  float top_p = 1.0f;        // 1 = all

  void validate() const;  // throws InvalidArgument
};

class Sampler {
 public:
  explicit Sampler(std::int32_t vocab_size);

  // `position` is the one that the token will take in its sequence.
  std::int32_t sample(const float* logits,  // (vocab_size)
                      const SamplingParams& params, std::int64_t position);

 private:
  // (logit - best logit) / temperature, id. The best one stays in every selection.
  using Candidate = std::pair<float, std::int32_t>;

  std::int32_t draw(std::size_t n_candidates, const SamplingParams& params, std::int64_t position);
  std::size_t keep_top_k(std::int32_t k);
  std::size_t keep_top_p(std::size_t n, const SamplingParams& params);

  double weight(const Candidate& candidate) const {
    return weights_[static_cast<std::size_t>(candidate.second)];
  }
  double mass(std::size_t begin, std::size_t end) const;  // of candidates

  std::vector<Candidate> candidates_;  // (vocab_size)
  std::vector<double> weights_;        // (vocab_size) exp of the candidates' logits
};

}  // namespace duplex
