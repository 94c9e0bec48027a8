#include "engine/input.h"

#include <utility>

#include "core/error.h"

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

void check_ids(const ModelConfig& config, std::span<const std::int32_t> ids) {
  for (std::size_t i = 0; i < ids.size(); ++i)
    check(ids[i] >= 0 && ids[i] < config.vocab_size, "text: token id ", i, " is ", ids[i],
          "; expected 0 to ", config.vocab_size - 1);
}

Image check_image(const ModelConfig& config, Image image) {
  check(config.vision.has_value(), "image: this checkpoint has no vision tower (no vision_config)");
  image.n_patches = patch_grid(image.view(), config.vision->patch_size).n_patches();
  const std::int32_t limit = config.interaction ? config.interaction->max_image_patches : 0;
  check(limit <= 0 || image.n_patches <= limit, "image: ", image.height, "x", image.width, " is ",
        image.n_patches, " patches; this checkpoint takes at most ", limit,
        " in a micro-turn, so scale it down");
  return image;
}

}  // namespace duplex
