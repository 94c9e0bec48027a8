// What the engine tests share: engines with random weights made in memory, and sound to feed them.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "core/error.h"
#include "engine/engine.h"
#include "tests/model/checkpoint.h"

namespace duplex::engine_tests {

inline constexpr std::int32_t kListen = 2;
inline constexpr std::int64_t kTurnSamples = 3200;

// The tiny model with everything, as an interaction model.
inline ModelConfig streaming_config() {
  ModelConfig config = model_tests::tiny_config();
  config.interaction = InteractionConfig{4, 3, 6, kListen, 3, 4, 5, 6, 7, 8};
  return config;
}

inline EngineOptions small_options(int n_threads = 1) {
  EngineOptions options;
  options.backend.n_threads = n_threads;
  options.memory_bytes = std::int64_t{16} << 20;
  options.max_batch_rows = 16;
  options.max_positions = 2000;
  options.rewind_rows = 16;
  return options;
}

inline std::shared_ptr<Engine> make_engine(const ModelConfig& config = streaming_config(),
                                           const EngineOptions& options = small_options()) {
  model_tests::RandomCheckpoint checkpoint(config, 1);
  return std::make_shared<Engine>(config, model_tests::views(checkpoint.tensors()), options,
                                  LoadProgress{});
}

// A sweep with a beat; `seed` shifts it.
inline std::vector<float> sound(std::int64_t n_samples, int seed = 0) {
  std::vector<float> samples(static_cast<std::size_t>(n_samples));
  for (std::size_t i = 0; i < samples.size(); ++i) {
    const double t = static_cast<double>(i) / 16000 + seed;
    samples[i] = static_cast<float>(0.3 * std::sin(2000 * t * (1 + 0.3 * std::sin(9 * t))));
  }
  return samples;
}

inline Image picture(std::int32_t height, std::int32_t width) {
  Image image;
  image.height = height;
  image.width = width;
  for (std::int32_t i = 0; i < height * width * 3; ++i)
    image.pixels.push_back(static_cast<std::uint8_t>(i * 37 % 256));
  return image;
}

inline Turn step_one(Session& session, std::int32_t max_tokens = -1) {
  const StepRequest request{&session, max_tokens};
  return session.engine().step({&request, 1}).front();
}

// Feeds one micro-turn of sound and steps.
inline Turn hear(Session& session, int seed) {
  session.feed_audio(sound(kTurnSamples, seed));
  return step_one(session);
}

inline std::vector<std::int32_t> think(Session& session, std::int32_t n) {
  const std::vector<std::int32_t> prompt = {9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20};
  session.lane().append_text(session, prompt, LogitsWanted::kNone);
  return session.lane().decode(session, n, {});
}

// What a stream holds: every committed block and its hash.
using Digests = std::vector<std::tuple<std::int32_t, std::int64_t, std::uint64_t>>;

inline bool is_empty(const EngineStats& stats) {
  return stats.n_sessions == 0 && stats.pool.n_used == 0 && stats.pool.n_promised == 0;
}

// Runs fn and says which error it raised, if any.
template <class E, class Fn>
bool throws(const Fn& fn) {
  try {
    fn();
  } catch (const E&) {
    return true;
  }
  return false;
}

// Takes the session's one place, which another thread may hold for a moment.
template <class Fn>
void when_free(const Fn& fn) {
  while (throws<SessionBusy>(fn)) std::this_thread::yield();
}

template <class E>
bool holds(const std::exception_ptr& error) {
  return error != nullptr && throws<E>([&] { std::rethrow_exception(error); });
}

}  // namespace duplex::engine_tests
