// How an exception becomes a message behind the C functions.
#pragma once

#include <string>

namespace duplex_bench {

void set_error(const std::string& message);

// What make() returns, or nullptr and the message of what it threw.
template <class Make>
void* guarded(const Make& make) {
  try {
    return make();
  } catch (const std::exception& error) {
    set_error(error.what());
    return nullptr;
  }
}

}  // namespace duplex_bench
