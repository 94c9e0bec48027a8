#include "ranks/commands.h"

#include "core/error.h"

namespace duplex {
namespace {

// Blocks of the convolution tape hold one position.
void put_view(ByteWriter& to, const TapeView& view, std::int64_t block,
              const AddressRanges& ranges) {
  RankAddress place;
  if (view.block_bytes > 0) {
    // Position 0 may lie before the range: the block that is written next lies inside it.
    const std::byte* const written = view.block(block);
    place = ranges.find(written);
    place.offset -= static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(written) -
                                              reinterpret_cast<std::uintptr_t>(view.base));
  }
  put_address(to, place);
  to.put(view.blocks_per_page);
  to.put(view.page_bytes);
  to.put(view.block_bytes);
}

TapeView get_view(ByteReader& from, const AddressRanges& ranges) {
  TapeView view;
  view.base = ranges.address(get_address(from));
  view.blocks_per_page = from.get<std::int64_t>();
  view.page_bytes = from.get<std::int64_t>();
  view.block_bytes = from.get<std::int64_t>();
  return view;
}

}  // namespace

void AddressRanges::add(std::int32_t range, std::byte* base, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  ranges_[range] = {base, bytes};
  by_base_[base] = range;
}

bool AddressRanges::has(std::int32_t range) const {
  const std::lock_guard lock(mutex_);
  return ranges_.contains(range);
}

std::pair<std::byte*, std::size_t> AddressRanges::remove(std::int32_t range) {
  const std::lock_guard lock(mutex_);
  const auto [base, bytes] = ranges_.at(range);
  by_base_.erase(base);
  ranges_.erase(range);
  return {base, bytes};
}

RankAddress AddressRanges::find(const std::byte* address) const {
  const std::lock_guard lock(mutex_);
  auto behind = by_base_.upper_bound(address);
  check(behind != by_base_.begin(), "ranks: an address lies in no reserved range");
  const auto& [base, range] = *--behind;
  check(address < base + ranges_.at(range).bytes, "ranks: an address lies in no reserved range");
  return {range, address - base};
}

// As numbers: position 0 of a tape that has moved on lies in no object.
std::byte* AddressRanges::address(const RankAddress& place) const {
  if (place.range < 0) return nullptr;
  const std::lock_guard lock(mutex_);
  return reinterpret_cast<std::byte*>(
      reinterpret_cast<std::uintptr_t>(ranges_.at(place.range).base) +
      static_cast<std::uintptr_t>(place.offset));
}

void put_address(ByteWriter& to, const RankAddress& place) {
  to.put(place.range);
  to.put(place.offset);
}

RankAddress get_address(ByteReader& from) {
  const auto range = from.get<std::int32_t>();
  return {range, from.get<std::int64_t>()};
}

void put_segments(ByteWriter& to, const Segments& segments, const AddressRanges& ranges) {
  to.put(segments.n_rows);
  to.put(segments.count);
  for (std::int32_t i = 0; i < segments.count; ++i) {
    const Segment& segment = segments.data[i];
    to.put(segment.row_begin);
    to.put(segment.n_rows);
    to.put(segment.position);
    const std::int64_t block = segment.position / kBlockPositions;
    put_view(to, segment.global, block, ranges);
    put_view(to, segment.local, block, ranges);
    put_view(to, segment.conv, segment.position, ranges);
    to.put(segment.n_forgotten);
    for (std::int32_t hole = 0; hole < segment.n_forgotten; ++hole) {
      to.put(segment.forgotten[hole].begin);
      to.put(segment.forgotten[hole].end);
    }
  }
}

Segments get_segments(ByteReader& from, const AddressRanges& ranges, SegmentStore& store) {
  Segments segments;
  segments.n_rows = from.get<std::int32_t>();
  segments.count = from.get<std::int32_t>();
  store.segments.clear();
  store.holes.clear();
  for (std::int32_t i = 0; i < segments.count; ++i) {
    Segment segment;
    segment.row_begin = from.get<std::int32_t>();
    segment.n_rows = from.get<std::int32_t>();
    segment.position = from.get<std::int64_t>();
    for (TapeView* view : {&segment.global, &segment.local, &segment.conv})
      *view = get_view(from, ranges);
    segment.n_forgotten = from.get<std::int32_t>();
    for (std::int32_t hole = 0; hole < segment.n_forgotten; ++hole) {
      const auto begin = from.get<std::int64_t>();
      store.holes.push_back({begin, from.get<std::int64_t>()});
    }
    store.segments.push_back(segment);
  }
  // The vectors have stopped growing: now they can be pointed into.
  const PositionRange* holes = store.holes.data();
  for (Segment& segment : store.segments) {
    segment.forgotten = holes;
    holes += segment.n_forgotten;
  }
  segments.data = store.segments.data();
  return segments;
}

void put_turn(ByteWriter& to, const TurnArgs& turn, const AddressRanges& ranges) {
  put_segments(to, turn.segments, ranges);
  to.put(turn.text.n_rows);
  to.put(turn.audio.n_rows);
  to.put(turn.audio.n_mels);
  to.put(turn.max_tokens);
  to.put(turn.n_stops);
  for (std::int32_t i = 0; i < turn.n_stops; ++i) to.put(turn.stops[i]);
  for (std::int32_t i = 0; i < turn.segments.count; ++i) to.put(turn.limits[i]);
}

TurnArgs get_turn(ByteReader& from, const AddressRanges& ranges, TurnStore& store) {
  TurnArgs turn{};
  turn.segments = get_segments(from, ranges, store.segments);
  turn.text.n_rows = from.get<std::int32_t>();
  turn.audio.n_rows = from.get<std::int32_t>();
  turn.audio.n_mels = from.get<std::int32_t>();
  turn.max_tokens = from.get<std::int32_t>();
  turn.n_stops = from.get<std::int32_t>();
  const auto get_all = [&](std::vector<std::int32_t>& values, std::int32_t n) {
    values.resize(static_cast<std::size_t>(n));
    for (std::int32_t& value : values) value = from.get<std::int32_t>();
    return values.data();
  };
  turn.stops = get_all(store.stops, turn.n_stops);
  turn.limits = get_all(store.limits, turn.segments.count);
  return turn;
}

}  // namespace duplex
