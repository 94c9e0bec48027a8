#include "engine/draft_lookup.h"

#include <algorithm>

namespace duplex {

DraftLookup::DraftLookup()
    : ids_(static_cast<std::size_t>(kCapacity)),
      behind_(static_cast<std::size_t>(kLongest - kShortest + 1) << kSlotBits, -1) {}

DraftLookup::DraftLookup(std::int64_t size, std::span<const std::int32_t> newest) : DraftLookup() {
  lost_ = size_ = size - static_cast<std::int64_t>(newest.size());
  for (const std::int32_t id : newest) push(id);
}

std::vector<std::int32_t> DraftLookup::newest() const {
  std::vector<std::int32_t> ids;
  for (std::int64_t place = oldest(); place < size_; ++place) ids.push_back(id(place));
  return ids;
}

std::int64_t DraftLookup::oldest() const { return std::max(lost_, size_ - kCapacity); }

std::uint64_t DraftLookup::mix(std::uint64_t hash, std::int32_t id) {
  return (hash ^ static_cast<std::uint64_t>(id + 1)) * 0x9e3779b97f4a7c15u;
}

std::size_t DraftLookup::slot(std::int64_t n_ids, std::uint64_t hash) {
  return (static_cast<std::size_t>(n_ids - kShortest) << kSlotBits) + (hash >> (64 - kSlotBits));
}

// Notes that the runs that end before `place` were last followed by what is there.
void DraftLookup::index(std::int64_t place) {
  std::uint64_t hash = 0;
  for (std::int64_t n = 1; n <= kLongest && place - n >= oldest(); ++n) {
    hash = mix(hash, id(place - n));
    if (n >= kShortest) behind_[slot(n, hash)] = place;
  }
}

void DraftLookup::push(std::int32_t id) {
  index(size_);
  ids_[static_cast<std::size_t>(size_ % kCapacity)] = id;
  ++size_;
}

void DraftLookup::truncate(std::int64_t size) {
  if (size == size_) return;
  lost_ = std::min(oldest(), size);
  size_ = size;
  std::fill(behind_.begin(), behind_.end(), -1);
  for (std::int64_t place = oldest() + 1; place < size_; ++place) index(place);
}

// Whether the `n_ids` before `place` are the newest of the history with `newest` as their last.
bool DraftLookup::is_match(std::int64_t place, std::int64_t n_ids, std::int32_t newest) const {
  if (place < 0 || place - n_ids < oldest() || id(place - 1) != newest) return false;
  for (std::int64_t i = 1; i < n_ids; ++i)
    if (id(place - 1 - i) != id(size_ - i)) return false;
  return true;
}

std::size_t DraftLookup::guess(std::int32_t newest, std::span<std::int32_t> guesses) const {
  std::int64_t found = -1;
  std::uint64_t hash = 0;
  for (std::int64_t n = 1; n <= kLongest && size_ - n + 1 >= oldest(); ++n) {
    hash = mix(hash, n == 1 ? newest : id(size_ - n + 1));
    if (n < kShortest) continue;
    const std::int64_t place = behind_[slot(n, hash)];
    if (is_match(place, n, newest)) found = place;
  }
  if (found < 0) return 0;
  // Behind the history come `newest` and the guesses themselves: a loop is guessed round and round.
  for (std::size_t i = 0; i < guesses.size(); ++i) {
    const std::int64_t place = found + static_cast<std::int64_t>(i);
    if (place < size_)
      guesses[i] = id(place);
    else
      guesses[i] = place == size_ ? newest : guesses[static_cast<std::size_t>(place - size_ - 1)];
  }
  return guesses.size();
}

}  // namespace duplex
