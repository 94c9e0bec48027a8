// The main function of the tests that need a GPU: 0 where all holds, 1 where something does not,
// 77 where there is no GPU, so that nothing was checked.

#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#include <cstdio>

#include "core/error.h"
#include "tests/gpu/device_ranks.h"

int main(int argc, char** argv) {
  constexpr int kNoGpu = 77;
  Catch::Session session;
  if (session.applyCommandLine(argc, argv) != 0) return 1;
  const Catch::ConfigData& asked = session.configData();
  if (asked.showHelp || asked.listTests || asked.listTestNamesOnly) return session.run() < 0;
  try {
    duplex::gpu_tests::open_gpu();
  } catch (const duplex::BackendUnavailable& error) {
    std::fprintf(stderr, "duplex_gpu_tests: nothing was checked: %s\n", error.what());
    return kNoGpu;
  }
  return session.run() == 0 ? 0 : 1;
}
