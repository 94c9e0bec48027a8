#include "engine/endless.h"

#include <algorithm>

#include "core/error.h"

namespace duplex {
namespace {

// Rows that must fit after all that can be forgotten was: of a turn, at the very least.
constexpr std::int64_t kLeastRoom = kBlockPositions;

// The hole at the end of the head; empty where nothing was forgotten there.
PositionRange middle_hole(std::span<const PositionRange> holes, std::int64_t head) {
  const std::int64_t begin = round_up(head, kBlockPositions);
  for (const PositionRange& hole : holes)
    if (hole.begin <= begin && begin <= hole.end) return hole;
  return {begin, begin};
}

}  // namespace

void Endless::validate(const SequenceLayout& layout) const {
  check(head >= 0, "endless: head: expected 0 positions or more, found ", head);
  check(recent >= layout.longest_window(), "endless: recent: expected at least ",
        layout.longest_window(),
        " positions (the longest window and what truncate can take back), found ", recent);
  const std::int64_t most = max_positions - kBlockPositions - kLeastRoom;  // rounding, and room
  check(head <= most && recent <= most && round_up(head, kBlockPositions) + recent <= most,
        "endless: expected head + recent of at most ", most,
        " with max_positions = ", max_positions, ", found ", head, " + ", recent,
        "; ask for less or open with more");
}

std::optional<Endless> Endless::with_limit(std::int64_t limit, const SequenceLayout& layout) const {
  const Endless other = is_automatic ? Endless{limit / 8, limit / 2, limit, true}
                                     : Endless{head, recent, limit, false};
  try {
    other.validate(layout);
  } catch (const InvalidArgument&) {
    if (!is_automatic) throw;
    return std::nullopt;
  }
  return other;
}

std::int64_t Endless::held_positions(const SequenceLayout& layout) const {
  const bool is_refused = max_positions > layout.lifetime_positions();  // by the sequence
  if (layout.global.is_inert() || is_refused) return max_positions;
  return max_positions + 2 * (layout.global.page_positions() - kBlockPositions);
}

// Other holes than the one at the head do not count as room until it reaches them: they may leave
// parts of pages at their edges too.
PositionRange Endless::to_forget(const Sequence& sequence, std::int64_t n_rows) const {
  const SequenceLayout& layout = sequence.layout();
  const PositionRange hole = middle_hole(sequence.forgotten(), head);
  const std::int64_t seen = sequence.length() - hole.size();
  if (layout.global.is_inert() || seen + n_rows <= max_positions) return {};
  const std::int64_t most = room(sequence);
  check<CapacityError>(n_rows <= most, "reserve: ", n_rows, " rows wanted, ", most,
                       " can be had of max_positions = ", max_positions,
                       " beside the head and the windows; append fewer at once or open with more");
  const std::int64_t wanted = round_down(sequence.length() - recent, kBlockPositions);
  const std::int64_t needed = hole.end + round_up(seen + n_rows - max_positions, kBlockPositions);
  return {hole.end, std::max(wanted, needed)};
}

std::int64_t Endless::room(const Sequence& sequence) const {
  const SequenceLayout& layout = sequence.layout();
  if (layout.global.is_inert()) return layout.lifetime_positions() - sequence.length();
  const PositionRange hole = middle_hole(sequence.forgotten(), head);
  const std::int64_t seen = sequence.length() - hole.size();
  const std::int64_t last =
      round_down(sequence.committed() - layout.longest_window(), kBlockPositions);
  return max_positions - seen + std::max<std::int64_t>(last - hole.end, 0);
}

void Endless::check_forget(const Sequence& sequence, std::int64_t begin, std::int64_t end) const {
  if (begin < 0 || end > sequence.length()) return;  // the sequence refuses that
  const PositionRange hidden = PositionRange{begin, end}.inward(kBlockPositions);
  if (hidden.is_empty()) return;
  ForgottenRanges holes;
  for (const PositionRange& hole : sequence.forgotten()) holes.add(hole);
  holes.add(hidden);
  check(holes.ranges().size() < ForgottenRanges::kMaxHoles ||
            !middle_hole(holes.ranges(), head).is_empty(),
        "forget: expected at most ", ForgottenRanges::kMaxHoles - 1,
        " separate holes in an endless session, which needs one itself, found one more at ", begin,
        " to ", end);
}

}  // namespace duplex
