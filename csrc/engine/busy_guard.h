// One caller at a time for a session.
#pragma once

#include <span>
#include <vector>

namespace duplex {

class Session;

// Holds sessions busy for the length of a call; throws SessionBusy or SessionClosed.
class BusyGuard {
 public:
  explicit BusyGuard(std::span<Session* const> sessions);
  explicit BusyGuard(Session& session);
  ~BusyGuard();
  BusyGuard(const BusyGuard&) = delete;
  BusyGuard& operator=(const BusyGuard&) = delete;

 private:
  void take(Session& session);

  std::vector<Session*> held_;
};

}  // namespace duplex
