#include "engine/input.h"

#include <utility>

namespace duplex {

void InputRows::clear() {
  rows.clear();
  n_done = 0;
  n_drafts = 0;
  frames.clear();
  images.clear();
}

void InputRows::add_image(Image image) {
  const auto index = static_cast<std::int32_t>(images.size());
  for (std::int64_t patch = 0; patch < image.n_patches; ++patch)
    rows.push_back({RowKind::kImage, static_cast<std::int32_t>(patch), index});
  images.push_back(std::move(image));
}

void InputRows::add_frames(DmelStream& audio) {
  const std::size_t n_frames = audio.frames_ready();
  frames.resize(n_frames * audio.n_mels());
  audio.take(n_frames, frames.data());
  for (std::size_t f = 0; f < n_frames; ++f)
    rows.push_back({RowKind::kAudio, static_cast<std::int32_t>(f)});
}

}  // namespace duplex
