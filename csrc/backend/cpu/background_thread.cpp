#include "backend/cpu/background_thread.h"

#include <sys/resource.h>
#include <unistd.h>

#include <utility>

namespace duplex {
namespace {

// The least share there is: with a third of an ordinary one, a turn still waited 3 ms for its user.
constexpr int kNice = 19;

void take_smaller_share() {
  // Of this thread alone, on Linux. Refused or not, the work is the same.
  const auto thread = static_cast<id_t>(gettid());
  setpriority(PRIO_PROCESS, thread, getpriority(PRIO_PROCESS, thread) + kNice);
}

}  // namespace

BackgroundThread::BackgroundThread() : thread_([this] { serve(); }) {}

BackgroundThread::~BackgroundThread() {
  {
    const std::lock_guard lock(mutex_);
    is_over_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void BackgroundThread::run(const std::function<void()>& work) {
  std::unique_lock lock(mutex_);
  work_ = &work;
  changed_.notify_all();
  changed_.wait(lock, [&] { return work_ == nullptr; });
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void BackgroundThread::serve() {
  take_smaller_share();
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return work_ != nullptr || is_over_; });
    if (work_ == nullptr) return;
    lock.unlock();
    std::exception_ptr error;
    try {
      (*work_)();
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    error_ = std::move(error);
    work_ = nullptr;
    changed_.notify_all();
  }
}

}  // namespace duplex
