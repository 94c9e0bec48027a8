// How a token is chosen among logits, in arithmetic that has one result on every machine: what an
// id weighs is a whole number, so a sum of weights does not depend on the order of its terms.
//
// A draw is a pure function of (logits, parameters, position), so that a stream gives the same
// tokens however it was cut, rewound or batched.
#pragma once

#include <bit>
#include <cstdint>

namespace duplex {

struct SamplingParams {
  std::uint64_t seed = 0;
  float temperature = 0.0f;  // 0 = greedy: the largest logit, the lower id on a tie
  std::int32_t top_k = 0;    // 0 = all
  float top_p = 1.0f;        // 1 = all

  void validate() const;  // throws InvalidArgument
};

// splitmix64: one well-mixed number for each (seed, position).
constexpr std::uint64_t random_bits(std::uint64_t seed, std::int64_t position) {
  std::uint64_t z = seed + 0x9e3779b97f4a7c15u * (static_cast<std::uint64_t>(position) + 1);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// The upper half of a b: of `b` things, the share a / 2^64.
constexpr std::uint64_t share_of(std::uint64_t a, std::uint64_t b) {
  const std::uint64_t a0 = a & 0xffffffffu, a1 = a >> 32, b0 = b & 0xffffffffu, b1 = b >> 32;
  const std::uint64_t low = a0 * b1 + (a0 * b0 >> 32);  // cannot exceed 64 bits, nor can the next
  const std::uint64_t middle = a1 * b0 + (low & 0xffffffffu);
  return a1 * b1 + (low >> 32) + (middle >> 32);
}

// How good a logit is, larger is better: of (logit - best logit) / temperature, which is at most 0.
// What is not a number is worst.
constexpr std::uint32_t kBestRank = 0x7fffffffu;
constexpr std::uint32_t sampling_rank(float logit, float best, float temperature) {
  if (logit == best) return kBestRank;
  const float scaled = (logit - best) / temperature;  // -infinity where a temperature is tiny
  return kBestRank - (std::bit_cast<std::uint32_t>(scaled) & kBestRank);
}

// exp(-below) in units of 2^-40, for less than kLeastWeighed: from 27.73 on nothing is left. The
// sum over so many ids has room in 64 bits.
constexpr int kWeightBits = 40;
constexpr std::int32_t kMaxSampledIds = 1 << 23;
constexpr float kLeastWeighed = 28.0f;
constexpr std::uint64_t weight_below_best(float below) {
  const float x = -below;
  const auto n = static_cast<std::int32_t>(x * 1.44269504088896341f - 0.5f);
  const auto whole = static_cast<float>(n);
  const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (r * r * p + r) + 1.0f;
  const auto exponent = static_cast<std::uint32_t>(n + kWeightBits + 127);
  return static_cast<std::uint64_t>(p * std::bit_cast<float>(exponent << 23));
}

// Of what the rank stands for.
constexpr std::uint64_t sampling_weight(std::uint32_t rank) {
  const auto below = std::bit_cast<float>(kBestRank - rank);
  return below < kLeastWeighed ? weight_below_best(below) : 0;
}

// The mass that top-p asks for, of all.
constexpr std::uint64_t wanted_mass(float top_p, std::uint64_t mass) {
  const std::uint64_t share = share_of(static_cast<std::uint64_t>(top_p * 0x1.0p32f) << 32, mass);
  return share > 0 ? share : 1;
}

}  // namespace duplex
