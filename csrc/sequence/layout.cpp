// From a model config to offsets, windows and the page size.
#include "sequence/layout.h"

#include <algorithm>

#include "backend/views.h"
#include "core/error.h"

namespace duplex {
namespace {

constexpr std::size_t kHugeFromBytes = std::size_t{1} << 20;
constexpr std::int64_t kMinConvPagePositions = 8;

// Addresses cost nothing until they are backed, but a process has only 2^47 bytes of them. The
// global tape begins with few and doubles them as the sequence lives; at most a quarter is its own.
constexpr std::int64_t kFirstRangePositions = std::int64_t{1} << 18;
constexpr std::int64_t kMaxRangeBytes = std::int64_t{1} << 45;
// A thousand years at 25 rows a second. No sum of positions or bytes comes near an overflow.
constexpr std::int64_t kMaxLifetimePositions = std::int64_t{1} << 40;

// Gives every layer its place and sets the block_bytes of the three tapes.
void place_layers(const ModelConfig& config, SequenceLayout& layout) {
  const std::int64_t model_bytes = round_up(config.d_model, kColumnAlign) * 4;
  for (const LayerConfig& layer : config.layers) {
    TapeLayout& kv = layer.is_local ? layout.local : layout.global;
    const AttentionShape& shape = config.attention(layer);
    const std::int64_t head = shape.d_head_padded();
    const std::int64_t columns = shape.n_kv_heads * head;
    LayerPlacement place;
    place.kv_offset_bytes = kv.block_bytes;
    kv.block_bytes += 2 * shape.n_kv_heads * kv_panel_bytes(layout.kv_dtype, head);
    place.k_conv_offset_bytes = layout.conv.block_bytes;
    place.v_conv_offset_bytes = place.k_conv_offset_bytes + columns * 4;
    place.attention_conv_offset_bytes = place.v_conv_offset_bytes + columns * 4;
    place.mlp_conv_offset_bytes = place.attention_conv_offset_bytes + model_bytes;
    layout.conv.block_bytes = place.mlp_conv_offset_bytes + model_bytes;
    layout.layers.push_back(place);
  }
}

std::size_t choose_page_bytes(const SequenceLayout& layout, std::size_t granularity) {
  std::int64_t least = std::max({layout.global.block_bytes, layout.local.block_bytes,
                                 layout.conv.block_bytes * kMinConvPagePositions});
  // Whole blocks of the tape that grows without end: what they leave of a page is lost.
  if (!layout.global.is_inert()) least = round_up(least, layout.global.block_bytes);
  const auto bytes = static_cast<std::size_t>(least);
  const std::size_t unit =
      bytes >= kHugeFromBytes ? std::max(granularity, kHugePageBytes) : granularity;
  return (bytes + unit - 1) / unit * unit;
}

}  // namespace

SequenceLayout SequenceLayout::make(const ModelConfig& config, DType kv_dtype,
                                    std::size_t page_granularity, RowLimits limits) {
  config.validate();
  check(page_granularity > 0, "page_granularity: expected a positive number, found 0");
  check(limits.rewind_rows >= 0, "rewind_rows: expected 0 or more, found ", limits.rewind_rows);
  check(limits.pending_rows > 0, "pending_rows: expected a positive number, found ",
        limits.pending_rows);
  SequenceLayout layout;
  layout.limits = limits;
  layout.kv_dtype = kv_dtype;
  place_layers(config, layout);
  layout.page_bytes = choose_page_bytes(layout, page_granularity);
  layout.global.block_positions = layout.local.block_positions = kBlockPositions;
  for (TapeLayout* tape : {&layout.global, &layout.local, &layout.conv}) {
    tape->page_bytes = static_cast<std::int64_t>(layout.page_bytes);
    if (!tape->is_inert()) tape->blocks_per_page = tape->page_bytes / tape->block_bytes;
  }
  layout.local.window = config.local.window + limits.rewind_rows;
  // A kernel of 1 reads no earlier row; the window stays 1 because 0 means "all".
  layout.conv.window = std::max(config.conv_kernel - 1, 1) + limits.rewind_rows;
  return layout;
}

std::int64_t SequenceLayout::window_pages(const TapeLayout& tape) const {
  if (tape.is_inert()) return 0;
  // A span that starts anywhere in a page touches one page more than it fills.
  return div_up(tape.window + limits.pending_rows - 1, tape.page_positions()) + 1;
}

std::int64_t SequenceLayout::growth_pages(std::int64_t max_positions) const {
  return global.is_inert() ? 0 : div_up(max_positions, global.page_positions());
}

std::int64_t SequenceLayout::longest_window() const {
  return local.is_inert() ? conv.window : std::max(local.window, conv.window);
}

std::int64_t SequenceLayout::lifetime_positions() const {
  if (global.is_inert()) return kMaxLifetimePositions;
  const std::int64_t n_pages = kMaxRangeBytes / global.page_bytes;
  return std::min(kMaxLifetimePositions, n_pages * global.page_positions());
}

std::int64_t SequenceLayout::first_range_positions() const {
  return std::min(kFirstRangePositions, lifetime_positions());
}

}  // namespace duplex
