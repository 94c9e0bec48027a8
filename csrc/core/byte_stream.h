// Plain values to bytes and back, for what is kept outside the process. Little-endian, as every
// machine that the engine runs on. A reader never goes beyond its bytes: it throws CheckpointError.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <ranges>
#include <span>
#include <type_traits>
#include <vector>

#include "core/error.h"

namespace duplex {

// No padding inside, or bytes of the stack would leave the process.
template <class T>
concept PlainValue = std::is_arithmetic_v<T> || std::is_enum_v<T>;

class ByteWriter {
 public:
  template <PlainValue T>
  void put(T value) {
    append(&value, sizeof value);
  }
  // Their number, then the values.
  template <std::ranges::contiguous_range Values>
    requires PlainValue<std::ranges::range_value_t<Values>>
  void put_all(const Values& values) {
    put(static_cast<std::uint64_t>(std::size(values)));
    append(std::data(values), std::span(values).size_bytes());
  }

  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  void append(const void* data, std::size_t n) {
    const std::size_t at = bytes_.size();
    bytes_.resize(at + n);
    if (n > 0) std::memcpy(bytes_.data() + at, data, n);
  }

  std::vector<std::byte> bytes_;
};

class ByteReader {
 public:
  explicit ByteReader(std::span<const std::byte> bytes) : rest_(bytes) {}

  template <PlainValue T>
  T get() {
    T value;
    std::memcpy(&value, take(sizeof value), sizeof value);
    return value;
  }
  // A byte that is neither 0 nor 1 is no bool.
  bool get_bool() {
    const auto value = get<std::uint8_t>();
    check<CheckpointError>(value <= 1, "snapshot: expected 0 or 1, found ", int{value});
    return value == 1;
  }
  template <class T>
  std::vector<T> get_all() {
    const auto n = get<std::uint64_t>();
    check<CheckpointError>(n <= rest_.size() / sizeof(T), "snapshot: expected ", n, " values of ",
                           sizeof(T), " bytes, found ", rest_.size(), " bytes");
    std::vector<T> values(static_cast<std::size_t>(n));
    if (n > 0)
      std::memcpy(values.data(), take(values.size() * sizeof(T)), values.size() * sizeof(T));
    return values;
  }
  std::span<const std::byte> rest() const { return rest_; }  // not read yet
  void check_at_end() const {
    check<CheckpointError>(rest_.empty(), "snapshot: ", rest_.size(), " bytes more than expected");
  }

 private:
  const std::byte* take(std::size_t n) {
    check<CheckpointError>(n <= rest_.size(), "snapshot: expected ", n, " bytes, found ",
                           rest_.size());
    const std::byte* const at = rest_.data();
    rest_ = rest_.subspan(n);
    return at;
  }

  std::span<const std::byte> rest_;
};

}  // namespace duplex
