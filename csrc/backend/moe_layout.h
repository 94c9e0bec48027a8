// How a mixture of experts is laid out in the scratch buffer of MoeArgs, alike for all backends.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/config.h"
#include "core/types.h"

namespace duplex {

inline constexpr std::int64_t kMoeAlign = 256;

// One (row, expert) pair; a row has top_k + n_shared of them in ascending expert order.
struct MoeChoice {
  std::int32_t expert;
  float weight;
  std::int32_t place;  // among the pairs sorted by expert
};

// The parts of the scratch buffer, in order; every part begins at a multiple of kMoeAlign bytes.
struct MoeScratch {
  float* x;                    // (n_rows, d_model padded) float32 rows for the router
  float* router_logits;        // (n_rows, n_experts + n_shared padded to 64)
  float* gate_up;              // (n_pairs, 2 * d_expert padded, to 64)
  std::byte* activated;        // (n_pairs, d_expert padded) in the dtype of the experts
  float* down;                 // (n_pairs, n_parts, d_model padded to 64)
  MoeChoice* choices;          // (n_rows, top_k + n_shared)
  std::int32_t* pair_row;      // (n_pairs) batch row of the pair at each place
  std::int32_t* expert_begin;  // (n_experts + n_shared + 1) first place of each expert
  std::int32_t* touched;       // experts with rows, ascending
  float* scores;               // (n_rows, n_experts)
  std::size_t bytes;
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

// Places the parts from `base` on; null measures.
inline MoeScratch lay_out_moe(const MoeSizes& s, void* base) {
  MoeScratch scratch{};
  std::size_t offset = 0;
  const auto take = [&](auto*& pointer, std::int64_t count) {
    using Element = std::remove_reference_t<decltype(*pointer)>;
    // As a number: while measuring, base is null, and null plus an offset is no pointer.
    pointer = reinterpret_cast<Element*>(reinterpret_cast<std::uintptr_t>(base) + offset);
    offset += static_cast<std::size_t>(
        round_up(count * static_cast<std::int64_t>(sizeof(Element)), kMoeAlign));
  };
  take(scratch.x, s.n_rows * round_up(s.d_model, kColumnAlign));
  take(scratch.router_logits, s.n_rows * s.router_stride());
  take(scratch.gate_up, s.n_pairs() * s.gate_up_stride());
  take(scratch.activated, s.n_pairs() * s.d_expert_padded * 4);
  take(scratch.down, s.n_pairs() * s.down_stride());
  take(scratch.choices, s.n_pairs());
  take(scratch.pair_row, s.n_pairs());
  take(scratch.expert_begin, s.n_all + 1);
  take(scratch.touched, s.n_all);
  take(scratch.scores, s.n_rows * s.n_all);
  scratch.bytes = offset;
  return scratch;
}

}  // namespace duplex
