// Worker threads that spin while a pass is running and sleep between passes.
//
// A job's tasks are cut into one run per thread: memory that lies in order is read fastest in order
// (two threads that take every other 64 KiB reach half the bandwidth of two that take halves). Who
// is done with his own run takes from the others'. Which thread runs a task is left open, what the
// task computes is not, so results do not depend on the number of threads. The caller works too and
// waits only for tasks that a worker has begun: a worker that the system keeps from running delays
// nobody.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace duplex {

class ThreadPool {
 public:
  explicit ThreadPool(int n_threads);  // including the caller
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int n_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Between begin_pass and end_pass idle workers spin instead of sleeping.
  void begin_pass();
  void end_pass();

  // Calls task(index, thread) for every index in [0, n_tasks); returns when all are done. One
  // caller at a time; tasks must not throw.
  template <class Task>
  void parallel_for(std::int64_t n_tasks, const Task& task) {
    if (n_tasks <= 1 || workers_.empty()) {
      for (std::int64_t i = 0; i < n_tasks; ++i) task(i, 0);
      return;
    }
    for (std::int64_t begin = 0; begin < n_tasks; begin += kMaxTasks) {
      const auto part = [&task, begin](std::int64_t i, int thread) { task(begin + i, thread); };
      run(std::min(n_tasks - begin, kMaxTasks), &part,
          [](const void* context, std::int64_t index, int thread) {
            (*static_cast<const decltype(part)*>(context))(index, thread);
          });
    }
  }

 private:
  using TaskFn = void (*)(const void*, std::int64_t, int);

  // A run of tasks in one word, so that a task is taken only from the job that was looked at:
  // generation (24 bits), end (20 bits), next task (20 bits).
  static constexpr int kTaskBits = 20;
  static constexpr std::int64_t kMaxTasks = (std::int64_t{1} << kTaskBits) - 1;
  static std::int64_t next_of(std::uint64_t run) {
    return static_cast<std::int64_t>(run) & kMaxTasks;
  }
  static std::int64_t end_of(std::uint64_t run) {
    return static_cast<std::int64_t>(run >> kTaskBits) & kMaxTasks;
  }
  struct alignas(64) Run {
    std::atomic<std::uint64_t> word{0};
  };

  void run(std::int64_t n_tasks, const void* context, TaskFn fn);
  void work(int thread);
  // Runs tasks of the current job until none is left to take: first those of its own run.
  void take_tasks(int thread);
  void take_from(Run& run, int thread);
  bool is_idle() const;

  std::vector<std::thread> workers_;
  std::vector<Run> runs_;  // one a thread
  // Written before the runs announce them, read by who has taken a task: the job cannot end
  // meanwhile.
  std::atomic<const void*> context_{nullptr};
  std::atomic<TaskFn> fn_{nullptr};
  std::uint64_t generation_ = 0;
  alignas(64) std::atomic<std::int64_t> n_done_{0};
  alignas(64) std::atomic<std::uint32_t> bell_{0};  // rung for sleepers
  std::atomic<int> sleepers_{0};
  std::atomic<bool> pass_active_{false};
  std::atomic<bool> stop_{false};
};

}  // namespace duplex
