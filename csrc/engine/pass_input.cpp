#include "engine/pass_input.h"

namespace duplex {

void PassInput::clear() {
  ids_.clear();
  text_rows_.clear();
  bins_.clear();
  sound_rows_.clear();
}

void PassInput::add_text(std::int32_t id, std::int32_t row) {
  ids_.push_back(id);
  text_rows_.push_back(row);
}

void PassInput::add_sound(const std::uint8_t* bins, std::int32_t row) {
  bins_.insert(bins_.end(), bins, bins + loaded_.config.audio->n_mels);
  sound_rows_.push_back(row);
}

void PassInput::embed(Backend& backend) const {
  backend.embed_text(text());
  backend.embed_audio(sound());
}

EmbedTextArgs PassInput::text() const {
  const Weights& weights = loaded_.weights;
  return {.ids = ids_.data(),
          .table = weights.embed,
          .table_dtype = weights.dtype,
          .norm = weights.embed_norm,
          .eps = loaded_.config.norm_eps,
          .d_model = loaded_.config.d_model,
          .n_rows = static_cast<std::int32_t>(ids_.size()),
          .out = model_.rows(),
          .out_stride = model_.row_stride(),
          .rows = text_rows_.data()};
}

EmbedAudioArgs PassInput::sound() const {
  if (!loaded_.config.audio) return {};
  const Weights& weights = loaded_.weights;
  return {.bins = bins_.data(),
          .n_mels = loaded_.config.audio->n_mels,
          .n_levels = loaded_.config.audio->n_levels,
          .table = weights.audio_table,
          .table_dtype = weights.dtype,
          .norm = weights.audio_norm,
          .eps = kTowerNormEps,
          .d_model = loaded_.config.d_model,
          .n_rows = static_cast<std::int32_t>(sound_rows_.size()),
          .out = model_.rows(),
          .out_stride = model_.row_stride(),
          .rows = sound_rows_.data()};
}

}  // namespace duplex
