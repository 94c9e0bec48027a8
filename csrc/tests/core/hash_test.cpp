#include "core/hash.h"

#include <catch2/catch.hpp>
#include <set>
#include <vector>

namespace duplex {
namespace {

std::uint64_t hash(const std::vector<std::byte>& bytes, std::size_t piece) {
  FastHash hash;
  for (std::size_t at = 0; at < bytes.size(); at += piece)
    hash.add(bytes.data() + at, std::min(piece, bytes.size() - at));
  return hash.value();
}

TEST_CASE("a hash does not depend on the pieces, and sees every byte") {
  std::vector<std::byte> bytes(1000);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 7);
  const std::uint64_t whole = hash(bytes, bytes.size());
  for (const std::size_t piece : {32u, 96u, 512u}) CHECK(hash(bytes, piece) == whole);
  std::set<std::uint64_t> seen{whole};
  for (std::byte& byte : bytes) {
    byte ^= std::byte{1};
    seen.insert(hash(bytes, 512));
    byte ^= std::byte{1};
  }
  CHECK(seen.size() == bytes.size() + 1);
  bytes.push_back(std::byte{0});
  CHECK(hash(bytes, 512) != whole);
}

}  // namespace
}  // namespace duplex
