// A sequence: the append-only state of one stream on its three tapes, and what may be done to it.
//
//   reserve -> segment (kernels write the rows) -> advance -> commit, and then reserve for the next
// turn, so that nothing is mapped inside one. Every call that throws leaves length, content and
// promises as they were. Nothing below the length is ever written. Not thread safe.
// Read next: sequence/layout.h for what lies where, sequence/page_pool.h for admission.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/op_args.h"
#include "sequence/forgotten.h"
#include "sequence/layout.h"
#include "sequence/page_pool.h"
#include "sequence/snapshot.h"
#include "sequence/tape.h"

namespace duplex {

struct SequenceUsage {
  TapeUsage global;
  TapeUsage local;
  TapeUsage conv;
  std::int64_t window_pages = 0;       // promised
  std::int64_t window_pages_held = 0;  // of those
  std::int64_t growth_pages_left = 0;  // promised and not yet taken

  std::int64_t held_bytes() const { return global.held_bytes + local.held_bytes + conv.held_bytes; }
};

// One whole block of a tape (0 global, 1 local, 2 convolution) and the hash of its bytes.
struct BlockDigest {
  std::int32_t tape = 0;
  std::int64_t block = 0;
  std::uint64_t hash = 0;
};

// Pool and layout outlive the sequence.
class Sequence {
 public:
  // Room for `max_positions` that are held at once: forgotten whole pages do not count, and a model
  // without global layers holds none. Throws InvalidArgument, or CapacityError with what would fit.
  static Sequence open(PagePool& pool, const SequenceLayout& layout, std::int64_t max_positions);
  // A second sequence with the same rows: full pages are shared, unfinished ones copied. It pays
  // for its windows and for the growth beyond the shared pages.
  Sequence fork(std::int64_t max_positions) const;
  // A sequence where `state` left off. Its pages are backed; the bytes of held_blocks() are still
  // to be written. Throws as open does, or CheckpointError for a state of another layout.
  static Sequence restore(PagePool& pool, const SequenceLayout& layout, const SequenceState& state,
                          std::int64_t max_positions);
  SequenceState state() const;

  std::int64_t length() const { return length_; }
  std::int64_t committed() const { return committed_; }
  std::int64_t backed() const { return backed_; }  // rows up to here can be written
  std::int64_t mapped() const;                     // rows up to here take no further page
  std::int64_t max_positions() const { return max_positions_; }
  const SequenceLayout& layout() const { return *layout_; }
  std::int64_t held_positions() const;  // what counts against max_positions
  std::span<const PositionRange> forgotten() const { return forgotten_.ranges(); }
  std::int64_t lowest_truncation() const;
  SequenceUsage usage() const;
  std::int64_t held_bytes() const;  // usage().held_bytes(), without asking the pool
  // Hashes of the committed blocks that are held, for tests: a committed byte never changes. For
  // memory that the host can read.
  std::vector<BlockDigest> digests() const;
  const Tape& global() const { return global_; }
  const Tape& local() const { return local_; }
  const Tape& conv() const { return conv_; }

  // Throws CapacityError unless `n_rows` more rows fit, in however many passes.
  void check_room(std::int64_t n_rows) const;
  // Backs `n_rows` rows beyond the length. Throws CapacityError at a limit.
  void reserve(std::int64_t n_rows);
  // For kernels that write rows [length, length + n_rows); valid until the next call that changes
  // the sequence. `row_begin` is the segment's place in the batch.
  Segment segment(std::int32_t row_begin, std::int32_t n_rows) const;
  // The rows are written.
  void advance(std::int64_t n_rows);
  // All rows are permanent; window pages that even a rewind cannot need return to the pool.
  void commit() noexcept;

  // Drops rows down to `n_rows` and what was backed beyond, so reserve again. Throws
  // InvalidArgument below lowest_truncation(); CapacityError when pages kept by a fork would have
  // to be paid twice.
  void truncate(std::int64_t n_rows);
  // Hides whole blocks of [begin, end) from global attention for ever and returns what this call
  // covered: the range rounded inward, empty when no block fits. Whole pages return to the pool.
  // Throws InvalidArgument for a range that windows still need or a ninth hole, CapacityError when
  // a fork keeps the pages and the room cannot be paid twice.
  PositionRange forget(std::int64_t begin, std::int64_t end);

 private:
  Sequence(PagePool& pool, const SequenceLayout& layout, std::int64_t max_positions,
           Promise promise);

  PagePool* pool_;
  const SequenceLayout* layout_;
  std::int64_t max_positions_;
  std::int64_t length_ = 0;
  std::int64_t committed_ = 0;
  std::int64_t backed_ = 0;
  ForgottenRanges forgotten_;
  // promise_.growth_pages() + the pages of global_ is always enough for max_positions.
  Promise promise_;
  Tape global_;
  Tape local_;
  Tape conv_;
};

}  // namespace duplex
