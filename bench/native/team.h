// A few threads that start together, meet at barriers and spin while they wait.
//
// Between runs the helpers sleep, so that they take nothing from whatever is measured next.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace duplex_bench {

class Team {
 public:
  explicit Team(int n_threads);  // including the caller
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int n_threads() const { return n_threads_; }
  // Calls work(thread) on every thread once all are awake. Returns the seconds from there until
  // the last has finished.
  double run(const std::function<void(int)>& work);

 private:
  // Waits until every thread has come here.
  void barrier();
  void serve(int thread);

  int n_threads_;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<std::uint32_t> bell_{0};
  alignas(64) std::atomic<int> n_arrived_{0};
  alignas(64) std::atomic<std::uint32_t> phase_{0};
  std::vector<std::thread> helpers_;
};

}  // namespace duplex_bench
