// The spectrum of 1600 real samples in double precision: the transform behind dMel frames.
//
// A mel bin is decided by rounding, so the spectrum is computed far more exactly than the float32
// reference does; the two then differ only where a value lies on the edge between two bins.
// Windowing and mel filters belong to dmel.cpp.
#pragma once

#include <vector>

namespace duplex {

class RealFft {
 public:
  static constexpr int kPoints = 1600;
  static constexpr int kBins = kPoints / 2 + 1;

  struct Complex {
    double re;
    double im;
  };

  RealFft();

  // bins[k] = sum over n of samples[n] exp(-2 pi i n k / kPoints)
  void transform(const double* samples,  // (kPoints)
                 Complex* bins) const;   // (kBins)

 private:
  struct Stage {
    int radix;
    int n_groups;                   // transforms of this stage that have twiddles of their own
    int stride;                     // product of the radices before this stage
    std::vector<Complex> twiddles;  // (n_groups, radix)
  };
  std::vector<Stage> stages_;
  std::vector<Complex> split_;  // exp(-2 pi i k / kPoints), (kBins)
};

}  // namespace duplex
