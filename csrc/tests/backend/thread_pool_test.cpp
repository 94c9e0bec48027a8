// The thread pool: every index exactly once, jobs back to back with and without a pass around them,
// and an end that never hangs. All of it runs under ThreadSanitizer too.
#include "backend/cpu/thread_pool.h"

#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace duplex {
namespace {

using std::chrono::milliseconds;

// Runs a job whose every task counts itself, in memory that only the pool orders.
bool runs_each_once(ThreadPool& pool, std::int64_t n_tasks) {
  std::vector<std::int32_t> counts(static_cast<std::size_t>(n_tasks), 0);
  std::atomic<bool> has_strange_thread{false};
  pool.parallel_for(LaneKind::kInteraction, n_tasks, [&](std::int64_t index, int thread) {
    ++counts[static_cast<std::size_t>(index)];
    if (thread < 0 || thread >= pool.n_threads()) has_strange_thread = true;
  });
  if (has_strange_thread) return false;
  for (const std::int32_t count : counts)
    if (count != 1) return false;
  return true;
}

TEST_CASE("every task runs exactly once", "[threads]") {
  const int n_threads = GENERATE(1, 2, 3, 4);
  ThreadPool pool(n_threads);
  CHECK(pool.n_threads() == n_threads);
  for (const std::int64_t n_tasks : {0, 1, 2, 3, 4, 5, 63, 64, 65, 1000, 20000})
    CHECK(runs_each_once(pool, n_tasks));
}

TEST_CASE("more tasks than one job can count are all run", "[threads]") {
  ThreadPool pool(2);
  constexpr std::int64_t kTasks = (std::int64_t{1} << 20) + 7;
  CHECK(runs_each_once(pool, kTasks));
}

TEST_CASE("thousands of jobs run back to back, in and out of passes", "[threads]") {
  const int n_threads = GENERATE(2, 4);
  ThreadPool pool(n_threads);
  // Each job reads what the one before it left, on whichever threads.
  std::vector<std::int64_t> values(6, 0);
  bool is_right = true;
  for (std::int64_t job = 0; job < 4000; ++job) {
    if (job % 50 == 0) pool.begin_pass(LaneKind::kInteraction);
    if (job % 50 == 40) pool.end_pass(LaneKind::kInteraction);
    const std::vector<std::int64_t> before = values;
    pool.parallel_for(LaneKind::kInteraction, job % 7, [&](std::int64_t i, int) {
      values[static_cast<std::size_t>(i)] = before[static_cast<std::size_t>(i)] + job;
    });
    for (std::size_t i = 0; i < values.size(); ++i)
      is_right &= values[i] == before[i] + (static_cast<std::int64_t>(i) < job % 7 ? job : 0);
  }
  CHECK(is_right);
}

TEST_CASE("sleeping workers wake for the next job", "[threads]") {
  ThreadPool pool(3);
  for (int i = 0; i < 5; ++i) {
    CHECK(runs_each_once(pool, 100));
    std::this_thread::sleep_for(milliseconds(3));  // far longer than a worker spins
  }
}

TEST_CASE("a pool ends whatever its workers are doing", "[threads]") {
  for (const int wait_ms : {0, 0, 0, 3}) {  // new, and asleep
    ThreadPool pool(4);
    std::this_thread::sleep_for(milliseconds(wait_ms));
  }
  {
    ThreadPool pool(4);
    CHECK(runs_each_once(pool, 10));
    std::this_thread::sleep_for(milliseconds(3));  // asleep after work
  }
  ThreadPool pool(4);
  pool.begin_pass(LaneKind::kInteraction);  // spinning
  CHECK(runs_each_once(pool, 10));
}

TEST_CASE("two pools work at once without mixing their tasks", "[threads]") {
  std::atomic<int> n_failures{0};
  const auto drive = [&n_failures](int n_threads) {
    ThreadPool pool(n_threads);
    for (int job = 0; job < 200; ++job)
      if (!runs_each_once(pool, 1 + job % 90)) ++n_failures;
  };
  std::thread other(drive, 2);
  drive(3);
  other.join();
  CHECK(n_failures == 0);
}

TEST_CASE("a slow task holds up the end of its job and nothing else", "[threads]") {
  ThreadPool pool(2);
  std::atomic<int> n_finished{0};
  pool.parallel_for(LaneKind::kInteraction, 8, [&](std::int64_t index, int) {
    if (index == 0) std::this_thread::sleep_for(milliseconds(5));
    ++n_finished;
  });
  CHECK(n_finished == 8);
}

TEST_CASE("the background lane stands still while the interaction lane computes", "[threads]") {
  const int n_threads = GENERATE(1, 2, 3);
  ThreadPool pool(n_threads);
  constexpr std::int64_t kTasks = 400;
  std::atomic<std::int64_t> n_done{0};
  std::thread background([&] {
    pool.begin_pass(LaneKind::kBackground);
    pool.parallel_for(LaneKind::kBackground, kTasks, [&](std::int64_t, int) {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
      ++n_done;
    });
    pool.end_pass(LaneKind::kBackground);
  });
  while (n_done == 0) std::this_thread::yield();
  for (int pass = 0; pass < 5; ++pass) {
    pool.begin_pass(LaneKind::kInteraction);
    const std::int64_t before = n_done;
    for (int job = 0; job < 5; ++job) {
      std::this_thread::sleep_for(milliseconds(1));
      pool.parallel_for(LaneKind::kInteraction, 10, [](std::int64_t, int) {});
    }
    CHECK(n_done <= before + n_threads);  // each thread ends the task that it is in
    pool.end_pass(LaneKind::kInteraction);
    std::this_thread::sleep_for(milliseconds(1));
  }
  background.join();
  CHECK(n_done == kTasks);
}

TEST_CASE("several callers share the background lane, each task runs once", "[threads]") {
  ThreadPool pool(2);
  std::atomic<int> n_failures{0};
  const auto drive = [&](LaneKind lane) {
    for (int job = 0; job < 150; ++job) {
      pool.begin_pass(lane);
      std::vector<std::int32_t> counts(static_cast<std::size_t>(1 + job % 90), 0);
      pool.parallel_for(lane, std::ssize(counts),
                        [&](std::int64_t i, int) { ++counts[static_cast<std::size_t>(i)]; });
      for (const std::int32_t count : counts) n_failures += count != 1;
      pool.end_pass(lane);
    }
  };
  std::vector<std::thread> others;
  for (int i = 0; i < 3; ++i) others.emplace_back(drive, LaneKind::kBackground);
  drive(LaneKind::kInteraction);
  for (std::thread& other : others) other.join();
  CHECK(n_failures == 0);
}

}  // namespace
}  // namespace duplex
