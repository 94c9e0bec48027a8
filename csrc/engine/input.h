// What is on its way into a sequence: pictures, rows in order, and the inbox of a session.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/config.h"
#include "encoders/dmel.h"
#include "encoders/hmlp.h"

namespace duplex {

// A picture that owns its pixels: (height, width, 3).
struct Image {
  std::vector<std::uint8_t> pixels;
  std::int32_t height = 0;
  std::int32_t width = 0;
  std::int64_t n_patches = 0;

  ImageView view() const { return {pixels.data(), height, width}; }
};

// Rows on their way into a sequence, in order.
enum class RowKind : std::uint8_t { kText, kAudio, kImage };
struct InputRow {
  RowKind kind;
  std::int32_t value;  // token id, index into frames, or patch of the image
  std::int32_t image = 0;
};
struct InputRows {
  std::vector<InputRow> rows;
  std::size_t n_done = 0;            // rows that passes have taken
  std::size_t n_drafts = 0;          // of the rows, the last: guesses not yet accepted
  std::vector<std::uint8_t> frames;  // (n, n_mels)
  std::vector<Image> images;

  void clear();
  void add_text(std::int32_t id) { rows.push_back({RowKind::kText, id}); }
  void add_image(Image image);
  // Takes every frame that is ready.
  void add_frames(DmelStream& audio);
};

// What was fed and not yet consumed.
struct Inbox {
  std::vector<float> samples;
  std::vector<Image> images;
  std::vector<std::int32_t> text;
  std::vector<std::int32_t> result;
};

// What the fed input of a session amounts to, before any of it is taken.
struct InputPlan {
  std::int64_t n_rows = 0;
  std::int64_t n_frames = 0;
  std::int64_t n_turns = 0;  // micro-turns, merged ones included
  std::int64_t missing_samples = 0;
};

// Throw InvalidArgument for what the model cannot read; the image comes back with its patches
// counted.
void check_ids(const ModelConfig& config, std::span<const std::int32_t> ids);
Image check_image(const ModelConfig& config, Image image);

}  // namespace duplex
