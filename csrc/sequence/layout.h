// How the state of one model is cut into tapes, blocks and pages; computed once per engine.
//
// A block of a key/value tape holds kBlockPositions positions of all layers of its kind, layer
// after layer: keys of all heads and values of all heads, n_kv_heads x (K panel, V panel), a panel
// being (d_head_padded, kBlockPositions) or its transpose as the backend likes, in the key/value
// dtype (kv_panel_bytes). A block of the convolution tape holds one position: per layer the float32
// inputs of its four short convolutions, in the order k, v, attention output, MLP output.
#pragma once

#include <cstdint>
#include <vector>

#include "core/config.h"
#include "core/types.h"
#include "sequence/tape.h"

namespace duplex {

// Where one layer lies, in bytes from the start of a block.
struct LayerPlacement {
  std::int64_t kv_offset_bytes = 0;  // in the tape of the layer's kind
  std::int64_t k_conv_offset_bytes = 0;
  std::int64_t v_conv_offset_bytes = 0;
  std::int64_t attention_conv_offset_bytes = 0;
  std::int64_t mlp_conv_offset_bytes = 0;
};

struct RowLimits {
  std::int64_t rewind_rows = 0;   // committed rows that truncate can always take back
  std::int64_t pending_rows = 0;  // rows backed or written beyond the committed length, at most
};

struct SequenceLayout {
  TapeLayout global;
  TapeLayout local;
  TapeLayout conv;
  std::vector<LayerPlacement> layers;  // (n_layers)
  DType kv_dtype = DType::kF32;        // of keys and values
  std::size_t page_bytes = 0;          // one size for all tapes
  RowLimits limits;

  // `page_granularity`: Backend::page_granularity(). Throws InvalidArgument.
  static SequenceLayout make(const ModelConfig& config, DType kv_dtype,
                             std::size_t page_granularity, RowLimits limits);

  // Most pages that the windowed tapes of one sequence hold at once.
  std::int64_t window_pages() const { return window_pages(local) + window_pages(conv); }
  std::int64_t window_pages(const TapeLayout& tape) const;
  // Pages that hold `max_positions` of the global tape.
  std::int64_t growth_pages(std::int64_t max_positions) const;
  // The longest window: forget stays behind it.
  std::int64_t longest_window() const;
  // Positions that one sequence can have in its whole life, forgotten ones included: the global
  // tape's range of addresses is finite.
  std::int64_t lifetime_positions() const;
  // Positions that the global tape reserves addresses for to begin with.
  std::int64_t first_range_positions() const;
};

}  // namespace duplex
