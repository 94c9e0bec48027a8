#include "tests/simt/schedule.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace duplex::simt {
namespace {

Schedule schedule_of_environment() {
  const char* const value = std::getenv("DUPLEX_SIMT_ORDER");
  const std::string text = value == nullptr ? "forward" : value;
  if (text == "forward") return {};
  if (text == "reverse") return {Order::kReverse};
  char* end = nullptr;
  const std::string prefix = "random:";
  if (text.starts_with(prefix) && text.size() > prefix.size()) {
    const unsigned long seed = std::strtoul(text.c_str() + prefix.size(), &end, 10);
    if (*end == '\0') return {Order::kRandom, 0, static_cast<std::uint32_t>(seed)};
  }
  throw std::logic_error("DUPLEX_SIMT_ORDER: expected forward, reverse or random:<seed>, found '" +
                         text + "'");
}

std::atomic<Schedule>& schedule() {
  static std::atomic<Schedule> value{schedule_of_environment()};
  return value;
}

}  // namespace

Schedule current_schedule() { return schedule().load(); }

void set_order(Order order, std::uint32_t seed) {
  const auto generation = static_cast<std::uint16_t>(schedule().load().generation + 1);
  schedule().store({order, generation, seed});
}

}  // namespace duplex::simt
