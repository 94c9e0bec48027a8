// The thread on which passes of a background lane run, with a smaller share of the cores.
//
// A thread that wakes up may take the core of one that has run for long. So when a pass of the
// interaction lane ends and background work goes on, its caller, woken, would run for some
// milliseconds before the turn could reach its user. A thread's share can be lowered by anyone but
// raised again by few, so callers keep theirs and the work changes the thread.
#pragma once

#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

namespace duplex {

class BackgroundThread {
 public:
  BackgroundThread();
  ~BackgroundThread();
  BackgroundThread(const BackgroundThread&) = delete;
  BackgroundThread& operator=(const BackgroundThread&) = delete;

  // Returns when the work is done; throws what it throws. One caller at a time.
  void run(const std::function<void()>& work);

 private:
  void serve();

  std::mutex mutex_;  // guards all below
  std::condition_variable changed_;
  const std::function<void()>* work_ = nullptr;  // until it is done
  std::exception_ptr error_;
  bool is_over_ = false;
  std::thread thread_;
};

}  // namespace duplex
