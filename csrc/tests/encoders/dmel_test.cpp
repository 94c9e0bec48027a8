// dMel frames: the same in any chunking, and nothing taken from a chunk that is refused. That the
// bins are those of the oracle is tested from Python.
#include "encoders/dmel.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <limits>
#include <random>
#include <string>

#include "core/error.h"

namespace duplex {
namespace {

using Bins = std::vector<std::uint8_t>;

const DmelAnalyzer& analyzer() {
  static const DmelAnalyzer shared{AudioConfig{}};
  return shared;
}

std::vector<float> noise(std::size_t n, unsigned seed = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, 0.1f);
  std::vector<float> samples(n);
  std::generate(samples.begin(), samples.end(), [&] { return normal(random); });
  return samples;
}

Bins take_all(DmelStream& stream) {
  Bins bins(stream.frames_ready() * static_cast<std::size_t>(analyzer().n_mels()));
  REQUIRE(stream.take(std::numeric_limits<std::size_t>::max(), bins.data()) * 80 == bins.size());
  return bins;
}

Bins whole(std::span<const float> samples) {
  DmelStream stream(analyzer());
  stream.push(samples);
  stream.pad_to_frame();
  return take_all(stream);
}

TEST_CASE("dmel: any chunking gives the frames of the whole sound", "[encoders]") {
  const std::vector<float> sound = noise(12345);
  const Bins expected = whole(sound);
  REQUIRE(expected.size() == 16 * 80);
  const unsigned seed = GENERATE(range(1u, 9u));
  std::mt19937 random(seed);
  DmelStream stream(analyzer());
  Bins found;
  std::span<const float> rest = sound;
  while (!rest.empty()) {
    const std::size_t longest = std::size_t{1} << (random() % 13);
    const std::size_t n = std::min<std::size_t>(rest.size(), random() % (longest + 1));
    stream.push(rest.first(n));
    rest = rest.subspan(n);
    if (random() % 3 == 0) {  // taking late and little must not matter either
      Bins some(2 * 80);
      some.resize(stream.take(2, some.data()) * 80);
      found.insert(found.end(), some.begin(), some.end());
    }
  }
  stream.pad_to_frame();
  const Bins last = take_all(stream);
  found.insert(found.end(), last.begin(), last.end());
  CHECK(found == expected);
}

TEST_CASE("dmel: a frame sees its own hop and the one before", "[encoders]") {
  const std::vector<float> sound = noise(2400);
  std::vector<float> window(800, 0.0f);  // silence before the first sample
  window.insert(window.end(), sound.begin(), sound.end());
  Bins expected(3 * 80);
  for (std::size_t i = 0; i < 3; ++i) analyzer().frame(&window[i * 800], &expected[i * 80]);
  CHECK(whole(sound) == expected);
}

TEST_CASE("dmel: frames appear when a hop is whole", "[encoders]") {
  DmelStream stream(analyzer());
  stream.push(noise(799));
  CHECK(stream.frames_ready() == 0);
  stream.push(noise(1));
  CHECK(stream.frames_ready() == 1);
  stream.pad_to_frame();  // nothing partial: no frame of padding alone
  CHECK(stream.frames_ready() == 1);
  stream.push(noise(1));
  stream.pad_to_frame();
  CHECK(stream.frames_ready() == 2);
  CHECK(stream.take(0, nullptr) == 0);
}

TEST_CASE("dmel: a refused chunk leaves the stream as it was", "[encoders]") {
  const float bad =
      GENERATE(std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity());
  const std::vector<float> sound = noise(2000);
  std::vector<float> broken = noise(3000, 2);
  broken[2900] = bad;
  DmelStream stream(analyzer());
  stream.push(std::span(sound).first(1000));
  CHECK_THROWS_AS(stream.push(broken), InvalidArgument);
  CHECK_THROWS_WITH(stream.push(broken), Catch::Contains("index 2900"));
  CHECK(stream.frames_ready() == 1);
  stream.push(std::span(sound).subspan(1000));
  stream.pad_to_frame();
  CHECK(take_all(stream) == whole(sound));
}

TEST_CASE("dmel: a restored stream goes on as the first did", "[encoders]") {
  const std::vector<float> sound = noise(5000);
  DmelStream first(analyzer());
  first.push(std::span(sound).first(2900));  // 3 frames and a partial hop
  Bins taken(80);
  first.take(1, taken.data());
  const DmelState state = first.state();
  const Bins waiting(first.waiting().begin(), first.waiting().end());
  CHECK(waiting.size() == 2 * 80);

  DmelStream second(analyzer());
  second.push(noise(1234, 3));
  second.restore(state, waiting);
  DmelStream copy = first;
  for (DmelStream* stream : {&first, &second, &copy}) stream->push(std::span(sound).subspan(2900));
  const Bins expected = take_all(first);
  CHECK(take_all(second) == expected);
  CHECK(take_all(copy) == expected);

  CHECK_THROWS_AS(second.restore(state, std::span(waiting).first(79)), InvalidArgument);
  CHECK_THROWS_AS(second.restore(state, Bins(80, 16)), InvalidArgument);  // levels are 0 to 15
  DmelState broken = state;
  broken.n_partial = kHopSamples;
  CHECK_THROWS_AS(second.restore(broken, waiting), InvalidArgument);
  broken = state;
  broken.samples[0] = std::numeric_limits<float>::infinity();
  CHECK_THROWS_AS(second.restore(broken, waiting), InvalidArgument);
}

TEST_CASE("dmel: there are 16 levels, whatever rows the table has", "[encoders]") {
  const DmelAnalyzer other(AudioConfig{.n_mels = 80, .n_levels = 4096});
  const std::vector<float> samples = noise(kWindowSamples);
  Bins expected(80), found(80);
  analyzer().frame(samples.data(), expected.data());
  other.frame(samples.data(), found.data());
  CHECK(found == expected);
}

TEST_CASE("dmel: impossible configurations are refused", "[encoders]") {
  CHECK_THROWS_AS(DmelAnalyzer(AudioConfig{.n_mels = 0, .n_levels = 16}), InvalidArgument);
  CHECK_THROWS_AS(DmelAnalyzer(AudioConfig{.n_mels = 801, .n_levels = 16}), InvalidArgument);
  CHECK_THROWS_AS(DmelAnalyzer(AudioConfig{.n_mels = 80, .n_levels = 15}), InvalidArgument);
}

}  // namespace
}  // namespace duplex
