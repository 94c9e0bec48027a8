// A fast hash of many bytes, to tell one set of weights or one block from another. Not for secrets.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace duplex {

// Four chains side by side, as FNV-1a over words of eight bytes: one would wait for its multiplier.
// All pieces but the last are multiples of kStride bytes: then it does not matter how the bytes are
// cut.
class FastHash {
 public:
  static constexpr std::size_t kStride = 32;

  void add(const std::byte* data, std::size_t n_bytes) {
    n_bytes_ += n_bytes;
    for (; n_bytes >= kStride; data += kStride, n_bytes -= kStride) add_stride(data);
    if (n_bytes == 0) return;
    std::array<std::byte, kStride> tail{};
    std::memcpy(tail.data(), data, n_bytes);
    add_stride(tail.data());
  }
  std::uint64_t value() const {
    std::uint64_t hash = n_bytes_;
    for (const std::uint64_t chain : chains_) hash = mix(hash, chain);
    return hash;
  }

 private:
  static std::uint64_t mix(std::uint64_t hash, std::uint64_t word) {
    hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
    return hash ^ (hash >> 29);
  }
  void add_stride(const std::byte* data) {
    for (std::size_t i = 0; i < chains_.size(); ++i) {
      std::uint64_t word;
      std::memcpy(&word, data + 8 * i, sizeof word);
      chains_[i] = mix(chains_[i], word);
    }
  }

  std::array<std::uint64_t, 4> chains_{1, 2, 3, 4};
  std::uint64_t n_bytes_ = 0;
};

}  // namespace duplex
