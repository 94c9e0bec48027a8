// How a mixture of experts is laid out in the scratch buffer of MoeArgs: what all backends have.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/config.h"
#include "core/types.h"

namespace duplex {

inline constexpr std::int64_t kMoeAlign = 256;

// One (row, expert) pair; a row has top_k + n_shared of them in ascending expert order.
struct MoeChoice {
  std::int32_t expert;
  float weight;
  std::int32_t place;  // among the pairs sorted by expert, where a backend sorts them
};

struct MoeSizes {
  std::int64_t n_rows, d_model, n_all, per_row, d_expert_padded, n_parts;

  std::int64_t n_pairs() const { return n_rows * per_row; }
  std::int64_t router_stride() const { return round_up(n_all, kPanelOutputs); }
  std::int64_t gate_up_stride() const { return round_up(2 * d_expert_padded, kPanelOutputs); }
  std::int64_t down_width() const { return round_up(d_model, kPanelOutputs); }
  std::int64_t down_stride() const { return n_parts * down_width(); }
};

inline MoeSizes moe_sizes(const MoeConfig& config, std::int64_t d_model, std::int64_t n_rows,
                          std::int32_t n_parts = 1) {
  return {n_rows,
          d_model,
          config.n_experts + config.n_shared,
          config.top_k + config.n_shared,
          round_up(config.d_expert, kColumnAlign),
          n_parts};
}

// Places arrays one behind the other from `base` on, each at a multiple of kMoeAlign bytes; null
// measures.
class Places {
 public:
  explicit Places(void* base) : base_(reinterpret_cast<std::uintptr_t>(base)) {}

  template <class Element>
  void take(Element*& pointer, std::int64_t count) {
    // As a number: while measuring, base is null, and null plus an offset is no pointer.
    pointer = reinterpret_cast<Element*>(base_ + bytes_);
    bytes_ += static_cast<std::size_t>(
        round_up(count * static_cast<std::int64_t>(sizeof(Element)), kMoeAlign));
  }
  std::size_t bytes() const { return bytes_; }

 private:
  std::uintptr_t base_;
  std::size_t bytes_ = 0;
};

struct MoeScratch {
  float* gate_up;        // (n_pairs, 2 * d_expert padded, to 64)
  std::byte* activated;  // (n_pairs, d_expert padded) in the dtype of the experts
  float* down;           // (n_pairs, n_parts, d_model padded to 64)
  MoeChoice* choices;    // (n_rows, top_k + n_shared)
};

inline MoeScratch lay_out_moe(const MoeSizes& s, Places& places) {
  MoeScratch scratch{};
  places.take(scratch.gate_up, s.n_pairs() * s.gate_up_stride());
  places.take(scratch.activated, s.n_pairs() * s.d_expert_padded * 4);
  places.take(scratch.down, s.n_pairs() * s.down_stride());
  places.take(scratch.choices, s.n_pairs());
  return scratch;
}

}  // namespace duplex
