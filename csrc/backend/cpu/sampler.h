// The sampler of the CPU: one row of logits after the other, on the calling thread.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/op_args.h"

namespace duplex {

class Sampler {
 public:
  // The token of one row: (n_vocab).
  std::int32_t sample(const float* logits, std::int32_t n_vocab, const SampleRow& row);

 private:
  struct Candidate {
    std::uint32_t rank;
    std::int32_t id;
  };
  // A total order, so selections are reproducible.
  static bool is_better(const Candidate& a, const Candidate& b) {
    return a.rank != b.rank ? a.rank > b.rank : a.id < b.id;
  }

  std::size_t keep_top_k(std::int32_t k);
  std::size_t keep_top_p(std::size_t n, float top_p);
  std::uint64_t mass(std::size_t begin, std::size_t end) const;  // of candidates
  std::int32_t draw(std::size_t n_candidates, const SampleRow& row);

  std::vector<Candidate> candidates_;   // (n_vocab)
  std::vector<std::uint64_t> weights_;  // (n_vocab) by id
};

}  // namespace duplex
