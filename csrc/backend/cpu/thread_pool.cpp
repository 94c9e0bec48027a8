#include "backend/cpu/thread_pool.h"

#include <system_error>

#include "core/error.h"
#include "core/pause.h"

namespace duplex {
namespace {

// Outside a pass a worker looks this often before it sleeps (tens of microseconds). Inside a pass
// it yields now and then, so that a machine with fewer cores than threads still makes progress.
constexpr int kSpinsBeforeSleep = 2000;
constexpr int kSpinsBeforeYield = 1000;

}  // namespace

ThreadPool::ThreadPool(int n_threads) {
  for (const LaneKind lane : {LaneKind::kInteraction, LaneKind::kBackground}) {
    job(lane).lane = lane;
    job(lane).runs = std::vector<Run>(static_cast<std::size_t>(n_threads));
  }
  try {
    for (int thread = 1; thread < n_threads; ++thread)
      workers_.emplace_back([this, thread] { work(thread); });
  } catch (const std::system_error& error) {
    const std::size_t n_made = workers_.size() + 1;
    stop();
    fail<CapacityError>("threads: expected ", n_threads, ", the system gave ", n_made, " (",
                        error.what(), "); load with fewer");
  }
  placement_.adopt(workers_);
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  stop_.store(true);
  bell_.fetch_add(1);
  bell_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::begin_pass(LaneKind lane) {
  // Workers that another pass keeps awake are where the system has put them.
  if (n_passes_.fetch_add(1, std::memory_order_acquire) == 0) placement_.keep_off_this_processor();
  if (lane == LaneKind::kInteraction) is_interacting_.store(1);
}

void ThreadPool::end_pass(LaneKind lane) {
  n_passes_.fetch_sub(1, std::memory_order_release);
  if (lane != LaneKind::kInteraction) return;
  is_interacting_.store(0);
  is_interacting_.notify_all();
}

void ThreadPool::park() const {
  while (is_interacting_.load() != 0) is_interacting_.wait(1);
}

bool ThreadPool::Job::is_taken() const {
  return std::ranges::all_of(runs, [](const Run& run) {
    const std::uint64_t word = run.word.load();
    return next_of(word) >= end_of(word);
  });
}

void ThreadPool::take_from(Job& job, Run& run, int thread) {
  std::uint64_t word = run.word.load(std::memory_order_acquire);
  while (next_of(word) < end_of(word) && may_run(job)) {
    if (!run.word.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel)) continue;
    job.fn.load(std::memory_order_relaxed)(job.context.load(std::memory_order_relaxed),
                                           next_of(word), thread);
    job.n_done.fetch_add(1, std::memory_order_release);
    word = run.word.load(std::memory_order_acquire);
  }
}

void ThreadPool::take_tasks(Job& job, int thread) {
  const auto own = static_cast<std::size_t>(thread);
  for (std::size_t i = 0; i < job.runs.size(); ++i)
    take_from(job, job.runs[(own + i) % job.runs.size()], thread);
}

ThreadPool::Job* ThreadPool::next_job() {
  for (Job& job : jobs_)
    if (may_run(job) && !job.is_taken()) return &job;
  return nullptr;
}

void ThreadPool::run(LaneKind lane, std::int64_t n_tasks, const void* context, TaskFn fn) {
  std::unique_lock<std::mutex> alone;
  if (lane == LaneKind::kBackground) alone = std::unique_lock(background_);
  Job& job = this->job(lane);
  job.context.store(context, std::memory_order_relaxed);
  job.fn.store(fn, std::memory_order_relaxed);
  job.n_done.store(0, std::memory_order_relaxed);
  ++job.generation;
  const std::int64_t n_runs = n_threads();
  for (std::int64_t i = 0; i < n_runs; ++i) {
    const auto begin = static_cast<std::uint64_t>(n_tasks * i / n_runs);
    const auto end = static_cast<std::uint64_t>(n_tasks * (i + 1) / n_runs);
    // seq_cst with sleepers_: a worker either sees the run or is seen asleep.
    job.runs[static_cast<std::size_t>(i)].word.store(job.generation << (2 * kTaskBits) |
                                                     end << kTaskBits | begin);
  }
  if (sleepers_.load() > 0) {
    bell_.fetch_add(1);
    bell_.notify_all();
  }
  for (int spins = 1;; ++spins) {
    give_way(lane);
    take_tasks(job, 0);
    if (job.n_done.load(std::memory_order_acquire) == n_tasks) return;
    pause();
    if (spins % kSpinsBeforeYield == 0) std::this_thread::yield();
  }
}

void ThreadPool::work(int thread) {
  for (;;) {
    Job* job = next_job();
    for (int spins = 1; job == nullptr; ++spins, job = next_job()) {
      if (stop_.load(std::memory_order_relaxed)) return;
      pause();
      if (n_passes_.load(std::memory_order_relaxed) > 0) {
        if (spins % kSpinsBeforeYield == 0) std::this_thread::yield();
      } else if (spins > kSpinsBeforeSleep) {
        const std::uint32_t rung = bell_.load();
        sleepers_.fetch_add(1);
        if (next_job() == nullptr && !stop_.load()) bell_.wait(rung);
        sleepers_.fetch_sub(1);
        spins = 0;
      }
    }
    take_tasks(*job, thread);
  }
}

}  // namespace duplex
