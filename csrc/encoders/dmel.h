// Discrete mel audio (dMel): 16 kHz sound to one frame of small integers every 50 ms.
//
// DmelAnalyzer holds the tables, shared by all sessions; DmelStream holds the samples that one
// session has not turned into frames yet. A frame looks back only, at the hop that it closes and
// the hop before, so any chunking of a sound gives the frames of the whole recording.
// The embedding of frames is an operation of the backend. The exact maths: docs/MODEL.md and
// duplex_engine/reference/dmel.py. Next: fft.h.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/config.h"
#include "encoders/fft.h"

namespace duplex {

inline constexpr std::int32_t kSampleRateHz = 16000;
inline constexpr std::int32_t kHopSamples = 800;
inline constexpr std::int32_t kWindowSamples = 1600;
inline constexpr std::int32_t kDmelLevels = 16;  // values of a bin; a table may have more rows
static_assert(kWindowSamples == RealFft::kPoints && kWindowSamples == 2 * kHopSamples);

// Immutable after construction, so any number of threads may use one.
class DmelAnalyzer {
 public:
  explicit DmelAnalyzer(const AudioConfig& config);

  std::int32_t n_mels() const { return static_cast<std::int32_t>(filters_.size()); }

  void frame(const float* samples,       // (kWindowSamples)
             std::uint8_t* bins) const;  // (n_mels), each below kDmelLevels

 private:
  struct Filter {
    std::int32_t first_bin;  // of the spectrum
    std::int32_t n_bins;
    std::int32_t weight_offset;  // into weights_
  };
  using Spectrum = std::array<double, RealFft::kBins>;

  Spectrum magnitudes(const float* samples) const;
  double log_mel(const Filter& filter, const Spectrum& magnitudes) const;

  RealFft fft_;
  std::vector<double> window_;  // (kWindowSamples)
  std::vector<Filter> filters_;
  std::vector<double> weights_;  // the non-zero part of each filter, one after the other
};

// Everything that later frames depend on: what a mark or a snapshot of a session keeps.
struct DmelState {
  std::array<float, kWindowSamples> samples{};  // the last whole hop, then a partial one
  std::int32_t n_partial = 0;                   // samples of the partial hop, below kHopSamples
};

// Throws InvalidArgument at the first NaN or infinity.
void check_finite(std::span<const float> samples);

// The audio input of one session. Copyable; the analyzer must outlive it. Memory grows only when
// more frames wait than ever before.
class DmelStream {
 public:
  explicit DmelStream(const DmelAnalyzer& analyzer);

  // Mono samples at kSampleRateHz, nominally -1 to 1. A NaN or infinity throws InvalidArgument
  // and leaves the stream as it was.
  void push(std::span<const float> samples);
  // Completes a partial hop with zeros: the end of a recording.
  void pad_to_frame();

  std::size_t n_mels() const { return static_cast<std::size_t>(analyzer_->n_mels()); }
  std::size_t frames_ready() const;
  // Hands out up to `max_frames` frames, oldest first; returns how many.
  std::size_t take(std::size_t max_frames, std::uint8_t* bins);  // (max_frames, n_mels)

  const DmelState& state() const { return state_; }
  // Frames that are ready and not yet taken, oldest first. (frames_ready, n_mels)
  std::span<const std::uint8_t> waiting() const;
  // Takes both back. Throws InvalidArgument, and changes nothing, where they cannot be this
  // model's.
  void restore(const DmelState& state, std::span<const std::uint8_t> waiting);

 private:
  void close_hop();

  const DmelAnalyzer* analyzer_;
  DmelState state_;
  std::vector<std::uint8_t> queue_;  // (n_taken + frames_ready, n_mels)
  std::size_t n_taken_ = 0;          // frames at the front of the queue that were handed out
};

}  // namespace duplex
