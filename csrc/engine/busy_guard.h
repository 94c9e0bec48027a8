// One caller at a time for a session.
#pragma once

#include <utility>
#include <vector>

#include "engine/session.h"

namespace duplex {

// Holds sessions busy for the length of a call: all of them, or it throws SessionBusy.
class BusyGuard {
 public:
  explicit BusyGuard(std::vector<Session*> sessions) : sessions_(std::move(sessions)) {
    auto next = sessions_.begin();
    try {
      for (; next != sessions_.end(); ++next) (*next)->begin_call();
    } catch (...) {
      while (next != sessions_.begin()) (*--next)->end_call();
      throw;
    }
  }
  ~BusyGuard() {
    for (Session* session : sessions_) session->end_call();
  }
  BusyGuard(const BusyGuard&) = delete;
  BusyGuard& operator=(const BusyGuard&) = delete;

 private:
  std::vector<Session*> sessions_;
};

}  // namespace duplex
