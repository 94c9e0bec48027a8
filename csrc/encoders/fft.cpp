// Even samples become real parts and odd samples imaginary parts of a complex signal of half the
// length; its Stockham transform (each stage reads one buffer and writes the other, so no bit
// reversal) is then split into the two spectra that it contains.
#include "encoders/fft.h"

#include <array>
#include <cmath>
#include <numbers>
#include <utility>

namespace duplex {
namespace {

using Complex = RealFft::Complex;

constexpr int kHalf = RealFft::kPoints / 2;
constexpr std::array<int, 5> kRadices = {4, 4, 2, 5, 5};

Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
Complex operator*(Complex a, Complex b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
Complex operator*(double a, Complex b) { return {a * b.re, a * b.im}; }
Complex minus_i_times(Complex a) { return {a.im, -a.re}; }
Complex conjugate(Complex a) { return {a.re, -a.im}; }

Complex root_of_unity(int k, int n) {  // exp(-2 pi i k / n)
  const double angle = -2.0 * std::numbers::pi * k / n;
  return {std::cos(angle), std::sin(angle)};
}

// In-place transforms of 2, 4 and 5 points.
void butterfly(Complex (&a)[2]) {
  const Complex sum = a[0] + a[1];
  a[1] = a[0] - a[1];
  a[0] = sum;
}

void butterfly(Complex (&a)[4]) {
  const Complex even_sum = a[0] + a[2], even_difference = a[0] - a[2];
  const Complex odd_sum = a[1] + a[3], odd_difference = minus_i_times(a[1] - a[3]);
  a[0] = even_sum + odd_sum;
  a[1] = even_difference + odd_difference;
  a[2] = even_sum - odd_sum;
  a[3] = even_difference - odd_difference;
}

void butterfly(Complex (&a)[5]) {
  constexpr double kCos1 = 0.30901699437494742410;   // cos(2 pi / 5)
  constexpr double kCos2 = -0.80901699437494742410;  // cos(4 pi / 5)
  constexpr double kSin1 = 0.95105651629515357212;   // sin(2 pi / 5)
  constexpr double kSin2 = 0.58778525229247312917;   // sin(4 pi / 5)
  const Complex sum1 = a[1] + a[4], difference1 = a[1] - a[4];
  const Complex sum2 = a[2] + a[3], difference2 = a[2] - a[3];
  const Complex even1 = a[0] + kCos1 * sum1 + kCos2 * sum2;
  const Complex even2 = a[0] + kCos2 * sum1 + kCos1 * sum2;
  const Complex odd1 = minus_i_times(kSin1 * difference1 + kSin2 * difference2);
  const Complex odd2 = minus_i_times(kSin2 * difference1 - kSin1 * difference2);
  a[0] = a[0] + sum1 + sum2;
  a[1] = even1 + odd1;
  a[2] = even2 + odd2;
  a[3] = even2 - odd2;
  a[4] = even1 - odd1;
}

// A stage combines points that lie `stride * n_groups` apart, turns the results by the twiddles of
// their group p and stores them `stride` apart.
template <int kRadix>
void run_stage(int n_groups, int stride, const Complex* twiddles, const Complex* in, Complex* out) {
  for (int p = 0; p < n_groups; ++p) {
    for (int q = 0; q < stride; ++q) {
      Complex a[kRadix];
      for (int j = 0; j < kRadix; ++j) a[j] = in[q + stride * (p + n_groups * j)];
      butterfly(a);
      for (int k = 0; k < kRadix; ++k) {
        const int column = p * kRadix + k;
        out[q + stride * column] = a[k] * twiddles[column];
      }
    }
  }
}

}  // namespace

RealFft::RealFft() {
  int length = kHalf;
  for (const int radix : kRadices) {
    Stage stage{radix, length / radix, kHalf / length, {}};
    for (int p = 0; p < stage.n_groups; ++p) {
      for (int k = 0; k < radix; ++k) stage.twiddles.push_back(root_of_unity(p * k, length));
    }
    stages_.push_back(std::move(stage));
    length /= radix;
  }
  for (int k = 0; k < kBins; ++k) split_.push_back(root_of_unity(k, kPoints));
}

void RealFft::transform(const double* samples, Complex* bins) const {
  // One point more than the transform has: the first point again, as the last of its period.
  Complex buffers[2][kHalf + 1];
  Complex* in = buffers[0];
  Complex* out = buffers[1];
  for (int n = 0; n < kHalf; ++n) in[n] = {samples[2 * n], samples[2 * n + 1]};
  for (const Stage& stage : stages_) {
    const auto run = stage.radix == 5   ? run_stage<5>
                     : stage.radix == 4 ? run_stage<4>
                                        : run_stage<2>;
    run(stage.n_groups, stage.stride, stage.twiddles.data(), in, out);
    std::swap(in, out);
  }

  // Now in[k] holds even[k] + i odd[k], and the conjugate of in[-k] even[k] - i odd[k].
  in[kHalf] = in[0];
  for (int k = 0; k < kBins; ++k) {
    const Complex mirrored = conjugate(in[kHalf - k]);
    const Complex even = 0.5 * (in[k] + mirrored);
    const Complex odd = 0.5 * minus_i_times(in[k] - mirrored);
    bins[k] = even + odd * split_[static_cast<std::size_t>(k)];
  }
}

}  // namespace duplex
