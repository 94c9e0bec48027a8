#include "team.h"

#include <chrono>

namespace duplex_bench {
namespace {

constexpr int kSpins = 1 << 16;  // then the processor is offered to others

void relax(int spins) {
  if (spins < kSpins)
    __builtin_ia32_pause();
  else
    std::this_thread::yield();
}

}  // namespace

Team::Team(int n_threads) : n_threads_(n_threads) {
  for (int thread = 1; thread < n_threads; ++thread)
    helpers_.emplace_back([this, thread] { serve(thread); });
}

Team::~Team() {
  stop_ = true;
  ++bell_;
  bell_.notify_all();
  for (std::thread& helper : helpers_) helper.join();
}

double Team::run(const std::function<void(int)>& work) {
  work_ = &work;
  ++bell_;
  bell_.notify_all();
  barrier();
  const auto start = std::chrono::steady_clock::now();
  work(0);
  barrier();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void Team::barrier() {
  const std::uint32_t phase = phase_.load();
  if (n_arrived_.fetch_add(1) + 1 == n_threads_) {
    n_arrived_ = 0;
    phase_ = phase + 1;
    return;
  }
  for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) relax(spins);
}

void Team::serve(int thread) {
  std::uint32_t seen = 0;
  while (true) {
    bell_.wait(seen);
    seen = bell_.load();
    if (stop_) return;
    barrier();
    (*work_)(thread);
    barrier();
  }
}

}  // namespace duplex_bench
