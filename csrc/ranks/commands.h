// What rank 0 asks of the workers, as bytes (parallel/commands.h carries them).
//
// Ranks have the same layout and the same pages, each with its share of the heads. So a page has
// one number everywhere, and an address is named by the range it lies in and how far:
// AddressRanges.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "backend/op_args.h"
#include "core/byte_stream.h"
#include "core/types.h"

namespace duplex {

// Of the page-memory channel. What answers (A) ends in a meeting of all ranks.
enum class MemoryCommand : std::uint8_t {
  kOpen,     // page bytes, pages: the first one
  kReserve,  // range, bytes (A: Status)
  kRelease,  // range
  kMap,      // address, page (A: Status)
  kUnmap,    // address
  kCopy,     // address, address, bytes
  kDiscard,  // page
  kRead,     // rank, address, bytes (A: the bytes)
  kWrite,    // rank, address, then the bytes
  kStop,
};

// Of the channel of a lane. Every pass answers, by the meetings inside it.
enum class PassCommand : std::uint8_t {
  kOpen,    // most rows of a pass: the first one
  kBlocks,  // depth (kModelLayers or one that drafts), segments, then the rows if hosts carry them
  kLogits,  // how many, then the head rows
  kTurn,    // put_turn
  kStop,
};
inline constexpr std::int32_t kModelLayers = -1;

// Whether a worker could do what was asked, as it lies in a slab.
struct Status {
  std::int32_t is_failed = 0;
  char message[252] = {};  // ends with zero
};

struct RankAddress {
  std::int32_t range = -1;  // -1: nullptr
  std::int64_t offset = 0;  // may lie outside the range: where position 0 would be
};

// The reserved ranges of this rank. Any thread.
class AddressRanges {
 public:
  void add(std::int32_t range, std::byte* base, std::size_t bytes);
  bool has(std::int32_t range) const;
  // Its address and bytes.
  std::pair<std::byte*, std::size_t> remove(std::int32_t range);
  RankAddress find(const std::byte* address) const;  // inside a range
  std::byte* address(const RankAddress& place) const;

 private:
  struct Range {
    std::byte* base;
    std::size_t bytes;
  };
  mutable std::mutex mutex_;
  std::unordered_map<std::int32_t, Range> ranges_;
  std::map<const std::byte*, std::int32_t> by_base_;
};

// A command and what it says, in order.
template <class Kind, class... Values>
ByteWriter command(Kind kind, Values... values) {
  ByteWriter bytes;
  bytes.put(kind);
  (bytes.put(values), ...);
  return bytes;
}

void put_address(ByteWriter& to, const RankAddress& place);
RankAddress get_address(ByteReader& from);

void put_segments(ByteWriter& to, const Segments& segments, const AddressRanges& ranges);
// Where segments and what they point to lie while a worker computes.
struct SegmentStore {
  std::vector<Segment> segments;
  std::vector<PositionRange> holes;
};
Segments get_segments(ByteReader& from, const AddressRanges& ranges, SegmentStore& store);
// A turn, as far as every rank has to know of it: kinds of rows, but not what they are made of.
void put_turn(ByteWriter& to, const TurnArgs& turn, const AddressRanges& ranges);
struct TurnStore {
  SegmentStore segments;
  std::vector<std::int32_t> limits, stops;
};
TurnArgs get_turn(ByteReader& from, const AddressRanges& ranges, TurnStore& store);
// Bytes that put_segments writes for one segment, at most.
inline constexpr std::size_t kSegmentBytes = 320;

}  // namespace duplex
