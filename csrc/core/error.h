// The exception types of the engine and the one function that throws them.
//
// Misuse and broken environments throw; expected outcomes are values. A message says what was
// expected, what was found, which name is meant and what to do. Each class below becomes a Python
// class of the same name (bindings/errors.cpp).
#pragma once

#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>

namespace duplex {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class InvalidArgument : public Error {
 public:
  using Error::Error;
};

// A checkpoint file or tensor that cannot be used.
class CheckpointError : public Error {
 public:
  using Error::Error;
};

// No room: pages, positions, rows or sessions. State is as it was before the call.
class CapacityError : public Error {
 public:
  using Error::Error;
};

class BackendUnavailable : public Error {
 public:
  using Error::Error;
};

class SessionClosed : public Error {
 public:
  using Error::Error;
};

// A rank of a tensor-parallel group is gone or does not answer; the whole group is over.
class RankFailed : public Error {
 public:
  using Error::Error;
};

// A second thread entered a session that is already in a step.
class SessionBusy : public Error {
 public:
  using Error::Error;
};

// The parts, one behind the other.
template <class... Parts>
std::string text_of(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

template <class E = InvalidArgument, class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw E(text_of(parts...));
}

// What the system refused: `error` is its errno.
template <class... Parts>
[[noreturn]] void fail_system(int error, const Parts&... parts) {
  fail<CapacityError>(parts..., ": ", std::strerror(error));
}

template <class E = InvalidArgument, class... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    fail<E>(parts...);
}

}  // namespace duplex
