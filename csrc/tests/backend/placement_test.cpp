// Workers and their caller on different processors.
#include "backend/cpu/placement.h"

#include <pthread.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <thread>
#include <vector>

namespace duplex {
namespace {

// Threads that sleep until the end.
class Sleepers {
 public:
  explicit Sleepers(int n) {
    for (int i = 0; i < n; ++i) threads.emplace_back([this] { is_over_.wait(false); });
  }
  ~Sleepers() {
    is_over_ = true;
    is_over_.notify_all();
    for (std::thread& thread : threads) thread.join();
  }
  bool may_run_on(std::size_t thread, int processor) {
    cpu_set_t allowed;
    REQUIRE(pthread_getaffinity_np(threads[thread].native_handle(), sizeof allowed, &allowed) == 0);
    return CPU_ISSET(static_cast<unsigned>(processor), &allowed);
  }

  std::vector<std::thread> threads;

 private:
  std::atomic<bool> is_over_{false};
};

std::vector<int> processors() {
  cpu_set_t allowed;
  REQUIRE(sched_getaffinity(0, sizeof allowed, &allowed) == 0);
  std::vector<int> found;
  for (int i = 0; i < CPU_SETSIZE; ++i)
    if (CPU_ISSET(static_cast<unsigned>(i), &allowed)) found.push_back(i);
  return found;
}

// Calls fn on a thread of its own that stays on the processor.
template <class Fn>
void on_processor(int processor, const Fn& fn) {
  std::thread([&] {
    cpu_set_t only;
    CPU_ZERO(&only);
    CPU_SET(static_cast<unsigned>(processor), &only);
    CHECK(sched_setaffinity(0, sizeof only, &only) == 0);
    fn();
  }).join();
}

TEST_CASE("workers are kept off the processor of their caller, wherever it goes", "[threads]") {
  const std::vector<int> all = processors();
  if (all.size() < 2) return;
  Sleepers workers(static_cast<int>(all.size()) - 1);
  Placement placement;
  placement.adopt(workers.threads);
  for (const int own : {all[0], all[1], all[0]}) {
    on_processor(own, [&] { placement.keep_off_this_processor(); });
    for (std::size_t worker = 0; worker < workers.threads.size(); ++worker)
      for (const int processor : all)
        CHECK(workers.may_run_on(worker, processor) == (processor != own));
  }
}

TEST_CASE("more workers than other processors are left where they are", "[threads]") {
  const std::vector<int> all = processors();
  Sleepers workers(static_cast<int>(all.size()));
  Placement placement;
  placement.adopt(workers.threads);
  on_processor(all[0], [&] { placement.keep_off_this_processor(); });
  for (std::size_t worker = 0; worker < workers.threads.size(); ++worker)
    CHECK(workers.may_run_on(worker, all[0]));
}

TEST_CASE("workers that the user has moved stay where they may run", "[threads]") {
  const std::vector<int> all = processors();
  if (all.size() < 2) return;
  Sleepers workers(1);
  Placement placement;
  placement.adopt(workers.threads);
  on_processor(all[0], [&] { placement.keep_off_this_processor(); });
  cpu_set_t only;
  CPU_ZERO(&only);
  CPU_SET(static_cast<unsigned>(all[0]), &only);
  const auto worker = workers.threads[0].native_handle();
  REQUIRE(pthread_setaffinity_np(worker, sizeof only, &only) == 0);
  for (const int own : {all[1], all[0]}) {
    on_processor(own, [&] { placement.keep_off_this_processor(); });
    CHECK(workers.may_run_on(0, all[0]));
    CHECK_FALSE(workers.may_run_on(0, all[1]));
  }
}

}  // namespace
}  // namespace duplex
