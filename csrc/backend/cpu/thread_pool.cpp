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
constexpr int kSpinsBeforeYield = 1000;

}  // namespace

ThreadPool::ThreadPool(int n_threads) : runs_(static_cast<std::size_t>(n_threads)) {
  for (int thread = 1; thread < n_threads; ++thread)
    workers_.emplace_back([this, thread] { work(thread); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  bell_.fetch_add(1);
  bell_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::begin_pass() { pass_active_.store(true, std::memory_order_relaxed); }
void ThreadPool::end_pass() { pass_active_.store(false, std::memory_order_relaxed); }

void ThreadPool::take_from(Run& run, int thread) {
  std::uint64_t word = run.word.load(std::memory_order_acquire);
  while (next_of(word) < end_of(word)) {
    if (!run.word.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel)) continue;
    fn_.load(std::memory_order_relaxed)(context_.load(std::memory_order_relaxed), next_of(word),
                                        thread);
    n_done_.fetch_add(1, std::memory_order_release);
    word = run.word.load(std::memory_order_acquire);
  }
}

void ThreadPool::take_tasks(int thread) {
  const auto own = static_cast<std::size_t>(thread);
  for (std::size_t i = 0; i < runs_.size(); ++i) take_from(runs_[(own + i) % runs_.size()], thread);
}

bool ThreadPool::is_idle() const {
  return std::ranges::all_of(runs_, [](const Run& run) {
    const std::uint64_t word = run.word.load();
    return next_of(word) >= end_of(word);
  });
}

void ThreadPool::run(std::int64_t n_tasks, const void* context, TaskFn fn) {
  context_.store(context, std::memory_order_relaxed);
  fn_.store(fn, std::memory_order_relaxed);
  n_done_.store(0, std::memory_order_relaxed);
  ++generation_;
  const std::int64_t n_runs = n_threads();
  for (std::int64_t i = 0; i < n_runs; ++i) {
    const auto begin = static_cast<std::uint64_t>(n_tasks * i / n_runs);
    const auto end = static_cast<std::uint64_t>(n_tasks * (i + 1) / n_runs);
    // seq_cst with sleepers_: a worker either sees the run or is seen asleep.
    runs_[static_cast<std::size_t>(i)].word.store(generation_ << (2 * kTaskBits) |
                                                  end << kTaskBits | begin);
  }
  if (sleepers_.load() > 0) {
    bell_.fetch_add(1);
    bell_.notify_all();
  }
  take_tasks(0);
  for (int spins = 1; n_done_.load(std::memory_order_acquire) != n_tasks; ++spins) {
    pause();
    if (spins % kSpinsBeforeYield == 0) std::this_thread::yield();
  }
}

void ThreadPool::work(int thread) {
  for (;;) {
    for (int spins = 1; is_idle(); ++spins) {
      if (stop_.load(std::memory_order_relaxed)) return;
      pause();
      if (pass_active_.load(std::memory_order_relaxed)) {
        if (spins % kSpinsBeforeYield == 0) std::this_thread::yield();
      } else if (spins > kSpinsBeforeSleep) {
        const std::uint32_t rung = bell_.load();
        sleepers_.fetch_add(1);
        if (is_idle() && !stop_.load()) bell_.wait(rung);
        sleepers_.fetch_sub(1);
        spins = 0;
      }
    }
    take_tasks(thread);
  }
}

}  // namespace duplex
