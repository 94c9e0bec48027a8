// Workers sleep between passes, and the system may wake one on the processor of the thread that
// wakes it although others are idle: a virtual machine's idle processor looks taken, because its
// host has given it away (vcpu_is_preempted). Both then share it for milliseconds. So workers are
// kept off the processor that their caller is on.
#pragma once

#include <sched.h>

#include <atomic>
#include <thread>
#include <vector>

namespace duplex {

class Placement {
 public:
  // The threads to place; those of a process with fewer processors than threads are left alone.
  void adopt(std::vector<std::thread>& threads);
  // Of the caller; one call at a time. A few nanoseconds, and some microseconds when the caller has
  // moved.
  void keep_off_this_processor();

 private:
  std::vector<std::thread::native_handle_type> threads_;
  cpu_set_t allowed_{};  // by the user
  cpu_set_t given_{};    // to the threads
  std::atomic<int> kept_off_{-1};
};

}  // namespace duplex
