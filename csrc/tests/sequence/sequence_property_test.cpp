// Random operations on a family of forks against the simplest model: a list of values per sequence.
// After every operation each sequence reads as its list says and the books balance; a refused
// operation changes nothing; at the end no page is missing.
#include <algorithm>
#include <catch2/catch.hpp>
#include <random>
#include <vector>

#include "tests/sequence/fixtures.h"

namespace duplex::sequence_tests {
namespace {

struct Twin {
  Sequence sequence;
  std::vector<std::uint64_t> values;
};

class Family {
 public:
  Family(std::uint32_t seed, RowLimits limits)
      : random_(seed),
        layout_(small_layout(limits)),
        pool_(layout_, 4 * layout_.window_pages() + 24) {}

  void step() {
    if (twins_.empty()) return open();
    const PoolStats before = pool_->stats();
    const std::size_t i = static_cast<std::size_t>(pick(std::ssize(twins_) - 1));
    const std::int64_t length = twins_[i].sequence.length();
    const std::vector<PositionRange> holes = holes_of(twins_[i]);
    try {
      change(i);
    } catch (const Error&) {
      ++n_refused_;
      REQUIRE(same(pool_->stats(), before));
      REQUIRE(twins_[i].sequence.length() == length);
      REQUIRE(holes_of(twins_[i]).size() == holes.size());
    }
    check_books();
  }

  void close_all() {
    twins_.clear();
    REQUIRE(is_whole(pool_));
  }
  std::int64_t n_refused() const { return n_refused_; }

 private:
  std::int64_t pick(std::int64_t most) {
    return std::uniform_int_distribution<std::int64_t>(0, most)(random_);
  }
  static std::vector<PositionRange> holes_of(const Twin& twin) {
    const auto holes = twin.sequence.forgotten();
    return {holes.begin(), holes.end()};
  }

  void open() {
    const std::int64_t max_positions = 1 + pick(16 * layout_.global.page_positions());
    twins_.push_back({Sequence::open(*pool_, layout_, max_positions), {}});
  }

  void change(std::size_t i) {
    Sequence& sequence = twins_[i].sequence;
    const std::int64_t length = sequence.length();
    switch (pick(19)) {
      case 0:
        return open();
      case 1:
        return fork(i);
      case 2:
        return close(i);
      case 3:
        return truncate(twins_[i], length - pick(400));
      case 4:
        return truncate(twins_[i], length - pick(length - sequence.lowest_truncation()));
      case 5:
        return truncate(twins_[i], std::max(sequence.committed(), length - pick(20)));
      case 6:
        return forget(sequence, length);
      case 7:
      case 8:
        return forget(sequence, sequence.committed() - layout_.longest_window());
      default:
        return write(twins_[i], pick(140), pick(3) > 0);
    }
  }

  void fork(std::size_t i) {
    const std::int64_t max_positions =
        twins_[i].sequence.held_positions() + pick(6 * layout_.global.page_positions()) - 10;
    Twin child{twins_[i].sequence.fork(max_positions), twins_[i].values};
    twins_.push_back(std::move(child));
  }

  void close(std::size_t i) {
    std::swap(twins_[i], twins_.back());
    twins_.pop_back();
  }

  void forget(Sequence& sequence, std::int64_t most) {
    const std::int64_t begin = pick(std::max<std::int64_t>(most, 0));
    sequence.forget(begin, begin + pick(std::max<std::int64_t>(most - begin, 0)));
  }

  void truncate(Twin& twin, std::int64_t n_rows) {
    twin.sequence.truncate(n_rows);
    twin.values.resize(static_cast<std::size_t>(n_rows));
  }

  void write(Twin& twin, std::int64_t n_rows, bool commit) {
    twin.sequence.reserve(n_rows);
    std::vector<std::uint64_t> rows(static_cast<std::size_t>(n_rows - pick(n_rows)));
    for (auto& row : rows) row = random_();
    write_rows(twin.sequence, rows);
    twin.values.insert(twin.values.end(), rows.begin(), rows.end());
    if (commit) twin.sequence.commit();
  }

  void check_books() {
    std::int64_t promised = 0;
    for (const Twin& twin : twins_) {
      REQUIRE(holds(twin.sequence, twin.values));
      const SequenceUsage usage = twin.sequence.usage();
      const std::int64_t growth = layout_.growth_pages(twin.sequence.max_positions());
      REQUIRE(usage.growth_pages_left + usage.global.held_bytes / layout_.global.page_bytes ==
              growth);
      REQUIRE(usage.window_pages_held <= usage.window_pages);
      promised += usage.growth_pages_left + usage.window_pages;
    }
    REQUIRE(pool_->stats().n_promised == promised);
    REQUIRE(pool_->n_unpromised() >= 0);
  }

  std::mt19937_64 random_;
  SequenceLayout layout_;
  TestPool pool_;
  std::vector<Twin> twins_;
  std::int64_t n_refused_ = 0;
};

TEST_CASE("random operations keep every row, every promise and every page") {
  const RowLimits limits = GENERATE(RowLimits{0, 100}, RowLimits{10, 130}, RowLimits{300, 130});
  const auto seed = GENERATE(range<std::uint32_t>(0, 12));
  Family family(seed, limits);
  for (int i = 0; i < 400; ++i) family.step();
  CHECK(family.n_refused() > 0);
  family.close_all();
}

}  // namespace
}  // namespace duplex::sequence_tests
