// Merging of holes.
#include "sequence/forgotten.h"

#include <algorithm>

#include "core/error.h"

namespace duplex {

PositionRange ForgottenRanges::add(PositionRange added) {
  std::array<PositionRange, kMaxHoles + 1> merged{};
  std::size_t n_merged = 0;
  for (const PositionRange& range : ranges()) {
    if (range.end < added.begin || range.begin > added.end) {
      merged[n_merged++] = range;
    } else {
      added = {std::min(range.begin, added.begin), std::max(range.end, added.end)};
    }
  }
  check(n_merged < kMaxHoles, "forget: expected at most ", kMaxHoles,
        " separate holes, found one more at ", added.begin, " to ", added.end,
        "; forget a range that touches an existing hole");
  merged[n_merged++] = added;
  std::sort(merged.begin(), merged.begin() + static_cast<std::ptrdiff_t>(n_merged),
            [](const PositionRange& a, const PositionRange& b) { return a.begin < b.begin; });
  std::copy_n(merged.begin(), n_merged, ranges_.begin());
  n_ranges_ = n_merged;
  return added;
}

std::int64_t ForgottenRanges::positions_in_whole_pages(std::int64_t page_positions) const {
  std::int64_t n_positions = 0;
  for (const PositionRange& range : ranges())
    n_positions += std::max<std::int64_t>(range.inward(page_positions).size(), 0);
  return n_positions;
}

}  // namespace duplex
