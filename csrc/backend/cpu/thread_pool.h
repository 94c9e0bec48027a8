// Worker threads that spin while a pass is running and sleep between passes.
//
// parallel_for hands out task indices by an atomic ticket: which thread runs a task is left open,
// what the task computes is not, so results do not depend on the number of threads.
#pragma once

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
    run(n_tasks, &task, [](const void* context, std::int64_t index, int thread) {
      (*static_cast<const Task*>(context))(index, thread);
    });
  }

 private:
  using TaskFn = void (*)(const void*, std::int64_t, int);

  void run(std::int64_t n_tasks, const void* context, TaskFn fn);
  void work(int thread);
  void take_tasks(int thread);

  std::vector<std::thread> workers_;
  // The job; written by the caller before job_ is raised, read by workers after they see it.
  const void* context_ = nullptr;
  TaskFn fn_ = nullptr;
  std::int64_t n_tasks_ = 0;
  alignas(64) std::atomic<std::uint32_t> job_{0};  // raised once per parallel_for
  alignas(64) std::atomic<std::int64_t> ticket_{0};
  alignas(64) std::atomic<int> running_{0};  // workers that have not finished the job
  alignas(64) std::atomic<bool> pass_active_{false};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace duplex
