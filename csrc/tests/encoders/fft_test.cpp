// The transform against the definition of the discrete Fourier transform.
#include "encoders/fft.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <numbers>
#include <random>
#include <vector>

namespace duplex {
namespace {

using Spectrum = std::vector<RealFft::Complex>;

Spectrum transform(const std::vector<double>& samples) {
  Spectrum bins(RealFft::kBins);
  RealFft().transform(samples.data(), bins.data());
  return bins;
}

Spectrum definition(const std::vector<double>& samples) {
  Spectrum bins;
  for (int k = 0; k < RealFft::kBins; ++k) {
    long double re = 0, im = 0;
    for (int n = 0; n < RealFft::kPoints; ++n) {
      // n * k reduced to one period, or the angle itself would lose digits
      const int turn = n * k % RealFft::kPoints;
      const long double angle = 2 * std::numbers::pi_v<long double> * turn / RealFft::kPoints;
      re += samples[static_cast<std::size_t>(n)] * std::cos(angle);
      im -= samples[static_cast<std::size_t>(n)] * std::sin(angle);
    }
    bins.push_back({static_cast<double>(re), static_cast<double>(im)});
  }
  return bins;
}

TEST_CASE("fft: equals the definition on noise", "[encoders]") {
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  std::vector<double> samples(RealFft::kPoints);
  std::generate(samples.begin(), samples.end(), [&] { return normal(random); });
  const Spectrum found = transform(samples), expected = definition(samples);
  double worst = 0;
  for (std::size_t k = 0; k < found.size(); ++k) {
    worst = std::max(worst, std::hypot(found[k].re - expected[k].re, found[k].im - expected[k].im));
  }
  CHECK(worst < 1e-12);  // bins are about sqrt(kPoints) = 40
}

TEST_CASE("fft: an impulse is flat and turns with its place", "[encoders]") {
  const std::size_t place = GENERATE(0, 1, 2, 799, 1599);
  std::vector<double> samples(RealFft::kPoints);
  samples[place] = 1.0;
  const Spectrum bins = transform(samples);
  for (std::size_t k = 0; k < bins.size(); ++k) {
    const double angle = -2 * std::numbers::pi * static_cast<double>(place * k % RealFft::kPoints) /
                         RealFft::kPoints;
    REQUIRE(bins[k].re == Approx(std::cos(angle)).margin(1e-13));
    REQUIRE(bins[k].im == Approx(std::sin(angle)).margin(1e-13));
  }
}

}  // namespace
}  // namespace duplex
