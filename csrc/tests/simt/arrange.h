// The orders of threads that every test of kernels goes through.
#pragma once

#include <catch2/catch.hpp>
#include <cstdint>

#include "tests/simt/grid.h"

namespace duplex::simt_tests {

inline constexpr simt::Order kOrders[] = {simt::Order::kForward, simt::Order::kReverse,
                                          simt::Order::kRandom};

// An order for as long as this lives.
class Arrange {
 public:
  explicit Arrange(simt::Order order, std::uint32_t seed = 1) { simt::set_order(order, seed); }
  ~Arrange() { simt::set_order(simt::Order::kForward); }
  Arrange(const Arrange&) = delete;
  Arrange& operator=(const Arrange&) = delete;
};

}  // namespace duplex::simt_tests
