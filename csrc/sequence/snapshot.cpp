// The numbers of a sequence, and the way back.
#include "sequence/snapshot.h"

#include <algorithm>

#include "sequence/admission.h"
#include "sequence/sequence.h"

namespace duplex {
namespace {

// Pages of a windowed tape that a restored sequence holds, from this position on: those of the
// state, without what its own window has left behind (the other may have rewound further).
std::int64_t first_held(const TapeLayout& tape, std::int64_t begin, std::int64_t committed) {
  const std::int64_t page = tape.page_positions();
  return std::max(begin, round_down(std::max<std::int64_t>(committed - tape.window, 0), page));
}

// `begin` is where the tape begins in the state.
void check_window(const char* name, const TapeLayout& tape, std::int64_t rewind_rows,
                  std::int64_t begin, std::int64_t length) {
  if (tape.is_inert()) return;
  const std::int64_t last = std::max<std::int64_t>(length - (tape.window - rewind_rows), 0);
  check<CheckpointError>(begin <= last && begin % tape.page_positions() == 0, "snapshot: ", name,
                         " tape: expected it to begin with a page, at position ", last,
                         " or before, found ", begin);
}

// Blocks with a position of `range`, a page at a time.
void add_runs(const Tape& tape, PositionRange range, std::vector<BlockRun>& runs) {
  const TapeLayout& layout = tape.layout();
  if (layout.is_inert()) return;
  const TapeView view = tape.view();
  const std::int64_t end = div_up(range.end, layout.block_positions);
  for (std::int64_t block = range.begin / layout.block_positions; block < end;) {
    const std::int64_t in_page = layout.blocks_per_page - block % layout.blocks_per_page;
    const std::int64_t n = std::min(in_page, end - block);
    const bool is_held = block * layout.block_positions >= tape.held().begin;
    runs.push_back(
        {is_held ? view.block(block) : nullptr, static_cast<std::size_t>(n * layout.block_bytes)});
    block += n;
  }
}

}  // namespace

void SequenceState::write(ByteWriter& to) const {
  for (const std::int64_t value : {max_positions, length, committed, local_begin, conv_begin})
    to.put(value);
  to.put(static_cast<std::uint64_t>(forgotten.size()));
  for (const PositionRange& hole : forgotten) {
    to.put(hole.begin);
    to.put(hole.end);
  }
}

SequenceState SequenceState::read(ByteReader& from) {
  SequenceState state;
  for (std::int64_t* value : {&state.max_positions, &state.length, &state.committed,
                              &state.local_begin, &state.conv_begin})
    *value = from.get<std::int64_t>();
  check<CheckpointError>(
      state.max_positions > 0 && state.committed >= 0 && state.committed <= state.length &&
          state.local_begin >= 0 && state.local_begin <= state.length && state.conv_begin >= 0 &&
          state.conv_begin <= state.length,
      "snapshot: expected 0 to ", state.length, " positions, found other counts of them");
  const auto n_holes = from.get<std::uint64_t>();
  check<CheckpointError>(n_holes <= ForgottenRanges::kMaxHoles, "snapshot: expected at most ",
                         ForgottenRanges::kMaxHoles, " holes, found ", n_holes);
  std::int64_t last_end = -1;
  for (std::uint64_t i = 0; i < n_holes; ++i) {
    const auto begin = from.get<std::int64_t>();
    const auto end = from.get<std::int64_t>();
    check<CheckpointError>(begin > last_end && begin < end && end <= state.committed &&
                               begin % kBlockPositions == 0 && end % kBlockPositions == 0,
                           "snapshot: expected holes of whole blocks, in order, found ", begin,
                           " to ", end);
    state.forgotten.push_back({begin, end});
    last_end = end;
  }
  return state;
}

SequenceState Sequence::state() const {
  const auto holes = forgotten();
  return {max_positions_,
          length_,
          committed_,
          local_.layout().is_inert() ? 0 : std::min(local_.held().begin, length_),
          std::min(conv_.held().begin, length_),
          {holes.begin(), holes.end()}};
}

Sequence Sequence::restore(PagePool& pool, const SequenceLayout& layout, const SequenceState& state,
                           std::int64_t max_positions) {
  const RowLimits& limits = layout.limits;
  check<CheckpointError>(state.length <= layout.lifetime_positions(), "snapshot: expected at most ",
                         layout.lifetime_positions(), " positions, found ", state.length);
  check<CheckpointError>(state.length - state.committed <= limits.pending_rows,
                         "snapshot: expected at most ", limits.pending_rows,
                         " rows beyond the committed ", state.committed, ", found ",
                         state.length - state.committed);
  check_window("local", layout.local, limits.rewind_rows, state.local_begin, state.length);
  check_window("convolution", layout.conv, limits.rewind_rows, state.conv_begin, state.length);
  ForgottenRanges forgotten;
  for (const PositionRange& hole : state.forgotten) forgotten.add(hole);
  const std::int64_t held =
      layout.global.is_inert()
          ? 0
          : state.length - forgotten.positions_in_whole_pages(layout.global.page_positions());
  check(max_positions >= held, "restore: expected max_positions of at least the ", held,
        " positions that the snapshot holds, found ", max_positions);
  Sequence sequence(pool, layout, max_positions,
                    admit(pool, layout, {"restore", max_positions, held, 0}));
  const PositionRange all{0, state.length};
  sequence.global_.resume(all, state.forgotten, sequence.promise_);
  const auto resume_window = [&](Tape& tape, std::int64_t begin) {
    const std::int64_t first = first_held(tape.layout(), begin, state.committed);
    tape.resume({first, state.length}, {}, sequence.promise_);
  };
  resume_window(sequence.local_, state.local_begin);
  resume_window(sequence.conv_, state.conv_begin);
  sequence.length_ = sequence.backed_ = state.length;
  sequence.committed_ = state.committed;
  sequence.forgotten_ = forgotten;
  return sequence;
}

std::vector<BlockRun> held_blocks(const Sequence& sequence, const SequenceState& state) {
  std::vector<BlockRun> runs;
  std::int64_t begin = 0;
  for (const PositionRange& hole : state.forgotten) {
    add_runs(sequence.global(), {begin, hole.begin}, runs);
    begin = hole.end;
  }
  add_runs(sequence.global(), {begin, state.length}, runs);
  add_runs(sequence.local(), {state.local_begin, state.length}, runs);
  add_runs(sequence.conv(), {state.conv_begin, state.length}, runs);
  return runs;
}

}  // namespace duplex
