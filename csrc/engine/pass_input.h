// The rows of a pass: whose they are, and what they are embedded from. Those of all its sessions
// together are one operation for text and one for sound.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "engine/loaded_model.h"
#include "model/inkling.h"

namespace duplex {

struct Call;

// Consecutive rows of one session in a pass.
struct PassPart {
  Call* call;
  std::size_t first;  // of its input
  std::int32_t n_rows;
  std::int32_t n_drafts;  // of the rows, the last
};

class PassInput {
 public:
  // Both outlive it.
  PassInput(const LoadedModel& loaded, Inkling& model) : loaded_(loaded), model_(model) {}

  void clear();
  // `row`: of the pass, in any order.
  void add_text(std::int32_t id, std::int32_t row);
  void add_sound(const std::uint8_t* bins, std::int32_t row);  // (n_mels)

  // Of the model's rows; they point to what was added.
  EmbedTextArgs text() const;
  EmbedAudioArgs sound() const;
  void embed(Backend& backend) const;

 private:
  const LoadedModel& loaded_;
  Inkling& model_;
  std::vector<std::int32_t> ids_;
  std::vector<std::int32_t> text_rows_;
  std::vector<std::uint8_t> bins_;
  std::vector<std::int32_t> sound_rows_;
};

}  // namespace duplex
