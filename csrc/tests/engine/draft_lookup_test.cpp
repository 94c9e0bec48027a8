#include "engine/draft_lookup.h"

#include <array>
#include <catch2/catch.hpp>
#include <vector>

namespace duplex {
namespace {

using Ids = std::vector<std::int32_t>;

DraftLookup remembering(const Ids& ids) {
  DraftLookup lookup;
  for (const std::int32_t id : ids) lookup.push(id);
  return lookup;
}

Ids guess(const DraftLookup& lookup, std::int32_t newest, std::size_t n) {
  Ids guesses(n, -1);
  guesses.resize(lookup.guess(newest, guesses));
  return guesses;
}

TEST_CASE("what followed the same two words is guessed") {
  const DraftLookup lookup = remembering({1, 2, 3, 4, 5, 9, 1});
  CHECK((guess(lookup, 2, 3) == Ids{3, 4, 5}));
  CHECK(guess(lookup, 3, 3).empty());  // 1 3 never occurred
  CHECK(guess(lookup, 7, 3).empty());
  CHECK(guess(lookup, 2, 0).empty());
}

TEST_CASE("one word alone is no match") {
  CHECK(guess(remembering({}), 1, 2).empty());
  CHECK(guess(remembering({1}), 1, 2).empty());
  CHECK(guess(remembering({1, 5, 2, 8, 7}), 1, 2).empty());
}

TEST_CASE("a longer match goes before a newer one, a newer before an older") {
  CHECK((guess(remembering({1, 2, 3, 4, 7, 2, 3, 5, 1, 2}), 3, 1) == Ids{4}));
  CHECK((guess(remembering({1, 2, 3, 4, 1, 2, 3, 5, 1, 2}), 3, 1) == Ids{5}));
  CHECK((guess(remembering({8, 2, 3, 4, 9, 2, 3, 5, 1, 2}), 3, 1) == Ids{5}));
}

TEST_CASE("a loop is guessed round and round") {
  CHECK((guess(remembering({1, 2, 3, 1, 2}), 3, 7) == Ids{1, 2, 3, 1, 2, 3, 1}));
  CHECK((guess(remembering({4, 4, 4}), 4, 3) == Ids{4, 4, 4}));
}

TEST_CASE("only the newest ids are known") {
  DraftLookup lookup = remembering({1, 2, 3});
  for (std::int32_t i = 0; i < DraftLookup::kCapacity - 4; ++i) lookup.push(10 + i);
  lookup.push(1);
  CHECK((guess(lookup, 2, 1) == Ids{3}));
  lookup.push(9);
  lookup.push(1);
  CHECK(guess(lookup, 2, 1).empty());
}

TEST_CASE("truncation leaves what a history without the dropped ids would be") {
  Ids ids;
  for (std::int32_t i = 0; i < 500; ++i) ids.push_back(i * i % 23);
  for (const std::int64_t kept : {0, 1, 2, 250, 499, 500}) {
    DraftLookup lookup = remembering(ids);
    const DraftLookup expected = remembering({ids.begin(), ids.begin() + kept});
    lookup.truncate(kept);
    REQUIRE(lookup.size() == kept);
    for (std::int32_t newest = 0; newest < 23; ++newest)
      CHECK((guess(lookup, newest, 5) == guess(expected, newest, 5)));
  }
}

TEST_CASE("ids that the ring lost do not come back") {
  Ids ids(static_cast<std::size_t>(DraftLookup::kCapacity) + 10);
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int32_t>(i);
  DraftLookup lookup = remembering(ids);
  lookup.truncate(30);  // of these, the ring still holds 10 to 29
  lookup.push(8);
  CHECK(guess(lookup, 9, 1).empty());
  lookup.push(12);
  CHECK((guess(lookup, 13, 2) == Ids{14, 15}));
  lookup.truncate(5);
  lookup.push(3);
  CHECK(guess(lookup, 4, 1).empty());
}

}  // namespace
}  // namespace duplex
