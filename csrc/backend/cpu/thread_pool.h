// Worker threads that spin while a pass is running and sleep between passes, for two lanes.
//
// A job's tasks are cut into one run per thread: memory that lies in order is read fastest in order
// (two threads that take every other 64 KiB reach half the bandwidth of two that take halves). Who
// is done with his own run takes from the others'. Which thread runs a task is left open, what the
// task computes is not, so results do not depend on the number of threads. The caller works too and
// waits only for tasks that a worker has begun: a worker that the system keeps from running delays
// nobody.
//
// The background lane stands still while a pass of the interaction lane is running: a thread that
// is at work for it finishes its task and takes no other. Its caller sleeps meanwhile.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "backend/cpu/placement.h"
#include "core/types.h"

namespace duplex {

class ThreadPool {
 public:
  explicit ThreadPool(int n_threads);  // including the caller
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int n_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Between begin_pass and end_pass idle workers spin instead of sleeping. Passes of the background
  // lane may overlap; those of the interaction lane may not.
  void begin_pass(LaneKind lane);
  void end_pass(LaneKind lane);
  class Pass {
   public:
    Pass(ThreadPool& pool, LaneKind lane) : pool_(pool), lane_(lane) { pool_.begin_pass(lane_); }
    ~Pass() { pool_.end_pass(lane_); }
    Pass(const Pass&) = delete;
    Pass& operator=(const Pass&) = delete;

   private:
    ThreadPool& pool_;
    LaneKind lane_;
  };
  // Where the background lane waits for the interaction lane's pass to end.
  void give_way(LaneKind lane) const {
    if (lane == LaneKind::kBackground && is_interacting_.load() != 0) park();
  }

  // Calls task(index, thread) for every index in [0, n_tasks); returns when all are done. One
  // caller at a time in the interaction lane, in the background lane they take turns; tasks must
  // not throw.
  template <class Task>
  void parallel_for(LaneKind lane, std::int64_t n_tasks, const Task& task) {
    if (n_tasks <= 1 || workers_.empty()) {
      for (std::int64_t i = 0; i < n_tasks; ++i) {
        give_way(lane);
        task(i, 0);
      }
      return;
    }
    for (std::int64_t begin = 0; begin < n_tasks; begin += kMaxTasks) {
      const auto part = [&task, begin](std::int64_t i, int thread) { task(begin + i, thread); };
      run(lane, std::min(n_tasks - begin, kMaxTasks), &part,
          [](const void* context, std::int64_t index, int thread) {
            (*static_cast<const decltype(part)*>(context))(index, thread);
          });
    }
  }

 private:
  void stop();
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
  // What a lane is working at. Context and function are written before the runs announce them, read
  // by who has taken a task: the job cannot end meanwhile.
  struct Job {
    LaneKind lane;
    std::vector<Run> runs;  // one a thread
    std::atomic<const void*> context{nullptr};
    std::atomic<TaskFn> fn{nullptr};
    std::uint64_t generation = 0;
    alignas(64) std::atomic<std::int64_t> n_done{0};
    bool is_taken() const;
  };

  Job& job(LaneKind lane) { return jobs_[static_cast<std::size_t>(lane)]; }
  bool may_run(const Job& job) const {
    return job.lane == LaneKind::kInteraction || is_interacting_.load() == 0;
  }
  void park() const;
  void run(LaneKind lane, std::int64_t n_tasks, const void* context, TaskFn fn);
  void work(int thread);
  // Runs tasks of a job until none is left to take: first those of its own run.
  void take_tasks(Job& job, int thread);
  void take_from(Job& job, Run& run, int thread);
  Job* next_job();  // nullptr: nothing to do

  std::vector<std::thread> workers_;
  Placement placement_;
  std::array<Job, 2> jobs_;
  std::mutex background_;                           // held by the caller of its job
  std::atomic<std::uint32_t> is_interacting_{0};    // a pass of the interaction lane is running
  alignas(64) std::atomic<std::uint32_t> bell_{0};  // rung for sleepers
  std::atomic<int> sleepers_{0};
  std::atomic<int> n_passes_{0};  // of both lanes
  std::atomic<bool> stop_{false};
};

}  // namespace duplex
