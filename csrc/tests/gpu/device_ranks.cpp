#include "tests/gpu/device_ranks.h"

#include <cuda_runtime.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <thread>

#include "core/error.h"
#include "device/cuda_check.h"

namespace duplex::gpu_tests {
namespace {

using cuda::check_cuda;

std::shared_ptr<cuda::Runtime> first_stream() {
  static const auto stream = std::make_shared<cuda::Runtime>();
  return stream;
}

}  // namespace

// A queue for each stream, so that a kernel that waits holds up nobody else's; and all kernels are
// loaded at once, as loading one waits for those that run.
const Gpu& open_gpu() {
  static const Gpu gpu = [] {
    ::setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
    ::setenv("CUDA_MODULE_LOADING", "EAGER", 1);
    Gpu found{first_stream()->device_name(), 0};
    check_cuda(cudaDeviceGetAttribute(&found.n_multiprocessors, cudaDevAttrMultiProcessorCount, 0),
               "cudaDeviceGetAttribute");
    return found;
  }();
  return gpu;
}

World::Runtimes streams_of(int n_ranks, int lane) {
  static std::array<World::Runtimes, 2> opened;
  World::Runtimes& all = opened.at(static_cast<std::size_t>(lane));
  const auto n = static_cast<std::size_t>(n_ranks);
  if (lane == 0 && all.empty()) all.push_back(first_stream());
  while (all.size() < n)
    all.push_back(std::make_shared<cuda::Runtime>(
        *first_stream(), lane == 0 ? LaneKind::kInteraction : LaneKind::kBackground));
  return {all.begin(), all.begin() + n_ranks};
}

void run_ranks(const std::vector<std::function<void()>>& programs) {
  std::vector<std::exception_ptr> errors(programs.size());
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < programs.size(); ++i)
    threads.emplace_back([&, i] {
      try {
        programs[i]();
      } catch (...) {
        errors[i] = std::current_exception();
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors)
    if (error != nullptr) std::rethrow_exception(error);
}

int run_self(const std::string& test_case) {
  std::array<char, 4096> path{};
  check<Error>(::readlink("/proc/self/exe", path.data(), path.size() - 1) > 0,
               "expected the path of this program in /proc/self/exe, found none");
  std::fflush(nullptr);
  const pid_t child = ::fork();
  check<Error>(child >= 0, "could not start another process");
  if (child == 0) {
    ::alarm(15);  // a call of the driver may wait without end
    ::execl(path.data(), path.data(), test_case.c_str(), "--warn", "NoTests",
            static_cast<char*>(nullptr));
    ::_exit(127);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

VisibleMemory::VisibleMemory(std::size_t bytes) {
  check_cuda(cudaHostAlloc(&data_, bytes, cudaHostAllocPortable), "cudaHostAlloc");
  std::memset(data_, 0, bytes);
}

VisibleMemory::~VisibleMemory() { cudaFreeHost(data_); }

}  // namespace duplex::gpu_tests
