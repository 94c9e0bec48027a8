// What the sequence tests share: a small model, a pool whose mappings fail on request, and rows
// that can be written to a sequence and recognised again.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "backend/cpu/page_memory.h"
#include "core/error.h"
#include "sequence/sequence.h"

namespace duplex::sequence_tests {

// Two global and three local layers; window 70, so that windows and blocks do not line up.
inline ModelConfig small_config() {
  ModelConfig config;
  config.vocab_size = config.unpadded_vocab_size = 32;
  config.d_model = 24;
  config.d_rel = 4;
  config.d_ff = 32;
  config.global = {2, 1, 8, 16, 0};
  config.local = {2, 2, 8, 16, 70};
  config.layers = {{true, false}, {false, false}, {true, false}, {true, false}, {false, false}};
  return config;
}

inline SequenceLayout small_layout(RowLimits limits = {10, 130}) {
  return SequenceLayout::make(small_config(), DType::kBF16, 4096, limits);
}

// Passes everything on to real pages, and notes which lie where; mapping number `fail_at` throws,
// once, and leaves nothing at its address, as it may be with several ranks or on a device.
class FlakyMemory final : public PageMemory {
 public:
  FlakyMemory(std::size_t page_bytes, std::int64_t n_pages)
      : pages_(create_cpu_page_memory(page_bytes, n_pages)) {}
  std::size_t page_bytes() const override { return pages_->page_bytes(); }
  std::int64_t n_pages() const override { return pages_->n_pages(); }
  std::byte* reserve_range(std::size_t bytes) override {
    ++n_ranges;
    return pages_->reserve_range(bytes);
  }
  void release_range(std::byte* base, std::size_t bytes) noexcept override {
    --n_ranges;
    mapped_.erase(mapped_.lower_bound(base), mapped_.lower_bound(base + bytes));
    pages_->release_range(base, bytes);
  }
  void map(std::byte* address, PageId page) override {
    if (fail_at >= 0 && fail_at-- == 0) {
      unmap(address);
      fail<CapacityError>("the system refuses");
    }
    pages_->map(address, page);
    mapped_[address] = page;
    ++n_maps;
  }
  void share(std::byte* address, PageId page) override {
    ++n_shares;
    map(address, page);
  }
  void unmap(std::byte* address) noexcept override {
    mapped_.erase(address);
    pages_->unmap(address);
  }
  void copy(std::byte* destination, const std::byte* source, std::size_t bytes) override {
    pages_->copy(destination, source, bytes);
  }
  void read(void* host, const std::byte* source, std::size_t bytes) const override {
    pages_->read(host, source, bytes);
  }
  void write(std::byte* destination, const void* host, std::size_t bytes) override {
    pages_->write(destination, host, bytes);
  }
  void discard(PageId page) noexcept override {
    ++n_discards;
    for (const auto& [address, there] : mapped_) n_stale += there == page;
    pages_->discard(page);
  }

  std::int64_t fail_at = -1;  // -1 = never
  std::int64_t n_maps = 0;    // shares included
  std::int64_t n_shares = 0;
  std::int64_t n_ranges = 0;  // reserved now
  std::int64_t n_discards = 0;
  std::int64_t n_stale = 0;  // places where a page that was discarded could still be seen

 private:
  std::unique_ptr<PageMemory> pages_;
  std::map<std::byte*, PageId> mapped_;
};

struct TestPool {
  TestPool(const SequenceLayout& layout, std::int64_t n_pages) {
    auto owned = std::make_unique<FlakyMemory>(layout.page_bytes, n_pages);
    memory = owned.get();
    pool = std::make_unique<PagePool>(std::move(owned));
  }
  PagePool& operator*() { return *pool; }
  PagePool* operator->() { return pool.get(); }

  FlakyMemory* memory;
  std::unique_ptr<PagePool> pool;
};

inline bool same(const PoolStats& a, const PoolStats& b) {
  return a.n_used == b.n_used && a.n_free == b.n_free && a.n_growth_used == b.n_growth_used &&
         a.n_promised == b.n_promised;
}

inline bool is_whole(const PoolStats& stats) {
  return stats.n_used == 0 && stats.n_promised == 0 && stats.n_free == stats.n_pages;
}

// All sequences are gone, and nothing of them is left.
inline bool is_whole(const TestPool& pool) {
  return is_whole(pool.pool->stats()) && pool.memory->n_ranges == 0 && pool.memory->n_stale == 0;
}

// A row leaves its mark at both ends of what a block gives it, so a copy that is too short shows.
inline std::vector<std::byte*> marks(const TapeView& view, std::int64_t block_positions,
                                     std::int64_t position) {
  std::byte* const block = view.block(position / block_positions);
  const std::int64_t slot = position % block_positions * 8;
  return {block + slot, block + view.block_bytes - 8 - slot};
}

inline void write_mark(const TapeView& view, std::int64_t block_positions, std::int64_t position,
                       std::uint64_t value) {
  if (view.block_bytes == 0) return;
  for (std::byte* place : marks(view, block_positions, position))
    std::memcpy(place, &value, sizeof(value));
}

inline bool has_mark(const TapeView& view, std::int64_t block_positions, std::int64_t position,
                     std::uint64_t value) {
  for (std::byte* place : marks(view, block_positions, position))
    if (std::memcmp(place, &value, sizeof(value)) != 0) return false;
  return true;
}

// Writes rows[length..] of the sequence as a kernel would.
inline void write_rows(Sequence& sequence, const std::vector<std::uint64_t>& values) {
  const auto n_rows = static_cast<std::int32_t>(values.size());
  const Segment segment = sequence.segment(0, n_rows);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::int64_t position = segment.position + static_cast<std::int64_t>(i);
    write_mark(segment.global, kBlockPositions, position, values[i]);
    write_mark(segment.local, kBlockPositions, position, values[i]);
    write_mark(segment.conv, 1, position, values[i]);
  }
  sequence.advance(n_rows);
}

// The page of the global tape that holds `position` was given back.
inline bool is_dropped(const Sequence& sequence, std::int64_t position) {
  const std::int64_t page = sequence.global().layout().page_positions();
  for (const PositionRange& hole : sequence.forgotten())
    if (round_up(hole.begin, page) <= position && position < hole.end / page * page) return true;
  return false;
}

inline bool is_hidden(const Sequence& sequence, std::int64_t position) {
  for (const PositionRange& hole : sequence.forgotten())
    if (hole.begin <= position && position < hole.end) return true;
  return false;
}

// Every row that is still held reads as it was written; values[i] is the row at position i. Of a
// restored sequence the hidden blocks of pages that stay are left out: they were not stored.
inline bool holds(const Sequence& sequence, const std::vector<std::uint64_t>& values,
                  bool is_restored = false) {
  const Segment segment = sequence.segment(0, 0);
  if (sequence.length() != static_cast<std::int64_t>(values.size())) return false;
  for (std::int64_t position = 0; position < sequence.length(); ++position) {
    const std::uint64_t value = values[static_cast<std::size_t>(position)];
    const bool is_gone =
        is_dropped(sequence, position) || (is_restored && is_hidden(sequence, position));
    if (!sequence.global().layout().is_inert() && !is_gone &&
        !has_mark(segment.global, kBlockPositions, position, value))
      return false;
    if (!sequence.local().layout().is_inert() && position >= sequence.local().held().begin &&
        !has_mark(segment.local, kBlockPositions, position, value))
      return false;
    if (position >= sequence.conv().held().begin && !has_mark(segment.conv, 1, position, value))
      return false;
  }
  return true;
}

// Appends `n_rows` rows numbered from `first_value` in commits of `chunk`.
inline void append(Sequence& sequence, std::vector<std::uint64_t>& values, std::int64_t n_rows,
                   std::uint64_t first_value, std::int64_t chunk = 100) {
  while (n_rows > 0) {
    const std::int64_t n = std::min(n_rows, chunk);
    sequence.reserve(n);
    std::vector<std::uint64_t> rows;
    for (std::int64_t i = 0; i < n; ++i) rows.push_back(first_value++);
    write_rows(sequence, rows);
    sequence.commit();
    values.insert(values.end(), rows.begin(), rows.end());
    n_rows -= n;
  }
}

}  // namespace duplex::sequence_tests
