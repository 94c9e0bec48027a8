// Window, spectrum, magnitudes, mel filters, logarithm, bin: the steps of a frame in this order.
// Frames are computed when their samples arrive, on the thread that pushes, so a micro-turn only
// copies finished bins and what waits is 40 times smaller than sound.
#include "encoders/dmel.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/error.h"

namespace duplex {
namespace {

constexpr double kLogMelMin = -7.0;
constexpr double kLogMelMax = 2.0;
constexpr double kPowerFloor = 1e-10;  // of |X|^2
constexpr double kMelFloor = 1e-10;

// Slaney's mel scale: linear up to 1 kHz, then 27 mel for every factor of 6.4.
constexpr double kLinearHzPerMel = 200.0 / 3.0;
constexpr double kBreakHz = 1000.0;
constexpr double kBreakMel = 15.0;
const double kLogStep = std::log(6.4) / 27.0;

double mel_to_hz(double mel) {
  return mel < kBreakMel ? mel * kLinearHzPerMel
                         : kBreakHz * std::exp(kLogStep * (mel - kBreakMel));
}

// Corners of n_mels overlapping triangles, evenly spaced in mel from 0 to the Nyquist frequency.
std::vector<double> triangle_corners_hz(std::int32_t n_mels) {
  const double top_mel = kBreakMel + std::log(kSampleRateHz / 2.0 / kBreakHz) / kLogStep;
  std::vector<double> corners;
  for (std::int32_t i = 0; i < n_mels + 2; ++i) {
    corners.push_back(mel_to_hz(top_mel / (n_mels + 1) * i));
  }
  return corners;
}

// Nearest of kDmelLevels centres spread evenly from kLogMelMin to kLogMelMax, ties to the lower.
std::uint8_t quantise(double log_mel) {
  constexpr double kStep = (kLogMelMax - kLogMelMin) / (kDmelLevels - 1);
  const double level = std::ceil((log_mel - kLogMelMin) / kStep - 0.5);
  return static_cast<std::uint8_t>(std::clamp(level, 0.0, kDmelLevels - 1.0));
}

}  // namespace

DmelAnalyzer::DmelAnalyzer(const AudioConfig& config) {
  check(config.n_mels >= 1 && config.n_mels < RealFft::kBins, "dmel: n_mels: expected 1 to ",
        RealFft::kBins - 1, ", found ", config.n_mels, "; check audio_config in config.json");
  check(config.n_levels >= kDmelLevels, "dmel: n_levels: expected at least ", kDmelLevels,
        " rows of the table for each mel, found ", config.n_levels,
        "; check audio_config in config.json");
  for (std::int32_t n = 0; n < kWindowSamples; ++n) {
    window_.push_back(0.5 - 0.5 * std::cos(2.0 * std::numbers::pi * n / kWindowSamples));
  }
  const std::vector<double> corners = triangle_corners_hz(config.n_mels);
  for (std::size_t mel = 0; mel < static_cast<std::size_t>(config.n_mels); ++mel) {
    const double low = corners[mel], centre = corners[mel + 1], high = corners[mel + 2];
    Filter filter{0, 0, static_cast<std::int32_t>(weights_.size())};
    for (std::int32_t bin = 0; bin < RealFft::kBins; ++bin) {
      const double hz = static_cast<double>(bin) * kSampleRateHz / RealFft::kPoints;
      const double height = std::min((hz - low) / (centre - low), (high - hz) / (high - centre));
      if (height <= 0.0) continue;
      if (filter.n_bins++ == 0) filter.first_bin = bin;
      // Unit area, rounded to float32 as the model was trained.
      weights_.push_back(static_cast<float>(height * (2.0 / (high - low))));
    }
    filters_.push_back(filter);
  }
}

DmelAnalyzer::Spectrum DmelAnalyzer::magnitudes(const float* samples) const {
  std::array<double, kWindowSamples> windowed;
  for (std::size_t n = 0; n < kWindowSamples; ++n) windowed[n] = samples[n] * window_[n];
  std::array<RealFft::Complex, RealFft::kBins> bins;
  fft_.transform(windowed.data(), bins.data());
  Spectrum out;
  for (std::size_t k = 0; k < RealFft::kBins; ++k) {
    const double power = bins[k].re * bins[k].re + bins[k].im * bins[k].im;
    out[k] = std::sqrt(power > kPowerFloor ? power : kPowerFloor);
  }
  return out;
}

double DmelAnalyzer::log_mel(const Filter& filter, const Spectrum& magnitudes) const {
  const double* weights = weights_.data() + filter.weight_offset;
  const double* first = magnitudes.data() + filter.first_bin;
  double sum = 0.0;
  for (std::int32_t i = 0; i < filter.n_bins; ++i) sum += weights[i] * first[i];
  return std::log10(std::max(sum, kMelFloor));
}

void DmelAnalyzer::frame(const float* samples, std::uint8_t* bins) const {
  const Spectrum spectrum = magnitudes(samples);
  for (const Filter& filter : filters_) *bins++ = quantise(log_mel(filter, spectrum));
}

DmelStream::DmelStream(const DmelAnalyzer& analyzer) : analyzer_(&analyzer) {
  constexpr std::size_t kReservedFrames = 64;  // 3.2 s: far more than a live session lags behind
  queue_.reserve(kReservedFrames * static_cast<std::size_t>(analyzer.n_mels()));
}

void check_finite(std::span<const float> samples) {
  const auto bad = std::find_if_not(samples.begin(), samples.end(),
                                    [](float sample) { return std::isfinite(sample); });
  check(bad == samples.end(), "audio: expected finite samples, found ",
        bad == samples.end() ? 0.0f : *bad, " at index ", bad - samples.begin(), " of ",
        samples.size(), "; nothing was taken: repair or drop this chunk and push again");
}

void DmelStream::push(std::span<const float> samples) {
  check_finite(samples);
  while (!samples.empty()) {
    const auto n_partial = static_cast<std::size_t>(state_.n_partial);
    const std::size_t n_copied = std::min(samples.size(), kHopSamples - n_partial);
    std::copy_n(samples.begin(), n_copied, state_.samples.begin() + kHopSamples + state_.n_partial);
    state_.n_partial += static_cast<std::int32_t>(n_copied);
    samples = samples.subspan(n_copied);
    if (state_.n_partial == kHopSamples) close_hop();
  }
}

void DmelStream::pad_to_frame() {
  if (state_.n_partial == 0) return;
  const auto partial_end = state_.samples.begin() + kHopSamples + state_.n_partial;
  std::fill(partial_end, state_.samples.end(), 0.0f);
  close_hop();
}

void DmelStream::close_hop() {
  const auto n_mels = static_cast<std::size_t>(analyzer_->n_mels());
  // Drop what was taken once it is the larger part: each frame moves at most once on average.
  if (n_taken_ * n_mels > queue_.size() / 2) {
    queue_.erase(queue_.begin(), queue_.begin() + static_cast<std::ptrdiff_t>(n_taken_ * n_mels));
    n_taken_ = 0;
  }
  queue_.resize(queue_.size() + n_mels);
  analyzer_->frame(state_.samples.data(), queue_.data() + queue_.size() - n_mels);
  std::copy(state_.samples.begin() + kHopSamples, state_.samples.end(), state_.samples.begin());
  state_.n_partial = 0;
}

std::size_t DmelStream::frames_ready() const {
  return queue_.size() / static_cast<std::size_t>(analyzer_->n_mels()) - n_taken_;
}

std::span<const std::uint8_t> DmelStream::waiting() const {
  return std::span(queue_).subspan(n_taken_ * static_cast<std::size_t>(analyzer_->n_mels()));
}

std::size_t DmelStream::take(std::size_t max_frames, std::uint8_t* bins) {
  const std::size_t n_frames = std::min(max_frames, frames_ready());
  const auto taken = waiting().first(n_frames * static_cast<std::size_t>(analyzer_->n_mels()));
  std::copy(taken.begin(), taken.end(), bins);
  n_taken_ += n_frames;
  if (frames_ready() == 0) {  // a copy of the stream need not copy them
    queue_.clear();
    n_taken_ = 0;
  }
  return n_frames;
}

void DmelStream::restore(const DmelState& state, std::span<const std::uint8_t> waiting) {
  check(state.n_partial >= 0 && state.n_partial < kHopSamples,
        "audio state: n_partial: expected 0 to ", kHopSamples - 1, ", found ", state.n_partial);
  check(std::all_of(state.samples.begin(), state.samples.end(),
                    [](float sample) { return std::isfinite(sample); }),
        "audio state: expected finite samples, found a NaN or infinity");
  const std::int32_t n_mels = analyzer_->n_mels();
  check(waiting.size() % static_cast<std::size_t>(n_mels) == 0 &&
            std::all_of(waiting.begin(), waiting.end(), [](int bin) { return bin < kDmelLevels; }),
        "audio state: waiting frames: expected frames of ", n_mels, " bins below ", kDmelLevels,
        ", found ", waiting.size(), " bytes that are not; was it saved with another model?");
  state_ = state;
  queue_.assign(waiting.begin(), waiting.end());
  n_taken_ = 0;
}

}  // namespace duplex
