#include "backend/cpu/thread_pool.h"

namespace duplex {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Outside a pass a worker looks this often before it sleeps (tens of microseconds). Inside a pass
// it yields now and then, so that a machine with fewer cores than threads still makes progress.
constexpr int kSpinsBeforeSleep = 2000;
constexpr int kSpinsBeforeYield = 4000;

}  // namespace

ThreadPool::ThreadPool(int n_threads) {
  for (int thread = 1; thread < n_threads; ++thread)
    workers_.emplace_back([this, thread] { work(thread); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  job_.fetch_add(1);
  job_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::begin_pass() { pass_active_.store(true, std::memory_order_relaxed); }
void ThreadPool::end_pass() { pass_active_.store(false, std::memory_order_relaxed); }

void ThreadPool::take_tasks(int thread) {
  for (;;) {
    const std::int64_t index = ticket_.fetch_add(1, std::memory_order_relaxed);
    if (index >= n_tasks_) return;
    fn_(context_, index, thread);
  }
}

void ThreadPool::run(std::int64_t n_tasks, const void* context, TaskFn fn) {
  context_ = context;
  fn_ = fn;
  n_tasks_ = n_tasks;
  ticket_.store(0, std::memory_order_relaxed);
  running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  job_.fetch_add(1);  // seq_cst with sleepers_: a worker either sees the job or is seen asleep
  if (sleepers_.load() > 0) job_.notify_all();
  take_tasks(0);
  for (int spins = 0; running_.load(std::memory_order_acquire) != 0; ++spins) {
    pause();
    if (spins % kSpinsBeforeYield == kSpinsBeforeYield - 1) std::this_thread::yield();
  }
}

void ThreadPool::work(int thread) {
  std::uint32_t seen = 0;
  for (;;) {
    int spins = 0;
    while (job_.load(std::memory_order_acquire) == seen) {
      pause();
      ++spins;
      if (pass_active_.load(std::memory_order_relaxed)) {
        if (spins % kSpinsBeforeYield == 0) std::this_thread::yield();
      } else if (spins > kSpinsBeforeSleep) {
        sleepers_.fetch_add(1);
        job_.wait(seen);
        sleepers_.fetch_sub(1);
      }
    }
    ++seen;
    if (stop_.load()) return;
    take_tasks(thread);
    running_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace duplex
