#include "engine/busy_guard.h"

#include "core/error.h"
#include "engine/lane.h"
#include "engine/session.h"

namespace duplex {

BusyGuard::BusyGuard(Session& session) { take(session); }

BusyGuard::BusyGuard(std::span<Session* const> sessions) {
  held_.reserve(sessions.size());
  try {
    for (Session* session : sessions) take(*session);
  } catch (...) {
    for (Session* session : held_) session->is_busy_.store(false);
    throw;
  }
}

void BusyGuard::take(Session& session) {
  session.lane_.owner().check_here();
  check<SessionBusy>(!session.is_busy_.exchange(true),
                     "session: another call is in progress on it; one session takes one call at a "
                     "time (feed_* may be called meanwhile)");
  held_.push_back(&session);
  session.call_epoch_ = session.epoch_.load();  // what comes from here on interrupts this call
}

BusyGuard::~BusyGuard() {
  for (Session* session : held_) session->is_busy_.store(false);
}

}  // namespace duplex
