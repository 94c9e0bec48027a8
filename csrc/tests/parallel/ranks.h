// What the tests of the parallel layer share: ranks as threads and as processes, random delays.
#pragma once

#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/pause.h"
#include "parallel/group.h"

namespace duplex {

using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

inline GroupOptions small_group(int n_ranks) {
  GroupOptions options;
  options.n_ranks = n_ranks;
  options.n_lanes = 2;
  options.slab_bytes = 1000;
  options.max_command_bytes = 4000;
  return options;
}

// Mostly none, now and then longer than a wait spins.
inline void random_delay(std::mt19937& random) {
  const auto kind = random() % 64;
  if (kind < 40) return;
  if (kind < 52) {
    for (auto i = random() % 200; i > 0; --i) pause();
  } else if (kind < 60) {
    std::this_thread::yield();
  } else {
    const auto longest = kind == 63 ? 400 : 60;
    std::this_thread::sleep_for(std::chrono::microseconds(random() % longest));
  }
}

// A thread that an exception ends, and nothing else; what it should have done is then missing.
inline std::jthread start_thread(std::function<void()> run) {
  return std::jthread([run = std::move(run)] {
    try {
      run();
    } catch (const std::exception&) {
    }
  });
}

// Runs each rank in a thread; what each of them ended with, empty where nothing was thrown.
inline std::vector<std::string> run_threads(const Group& group,
                                            const std::function<void(Group)>& run_rank) {
  std::vector<std::string> ends(static_cast<std::size_t>(group.n_ranks()));
  std::vector<std::jthread> threads;
  for (int rank = 0; rank < group.n_ranks(); ++rank) {
    threads.emplace_back([&, rank] {
      try {
        run_rank(group.as(rank));
      } catch (const std::exception& error) {
        ends[static_cast<std::size_t>(rank)] = error.what();
      }
    });
  }
  for (std::jthread& thread : threads) thread.join();
  return ends;
}

// Starts a process that joins the group and runs a rank; it exits with what `run_rank` returns.
inline pid_t start_process(const Group& group, int rank,
                           const std::function<int(Group)>& run_rank) {
  const pid_t child = ::fork();
  if (child != 0) return child;
  int status = 99;
  try {
    status = run_rank(Group::join(::dup(group.fd()), rank));
  } catch (...) {
  }
  ::_exit(status);
}

// The exit status of a process, or minus the signal that ended it.
inline int end_of(pid_t child) {
  int status = 0;
  if (::waitpid(child, &status, 0) != child) return -1000;
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

}  // namespace duplex
