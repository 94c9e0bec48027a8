// What the tests of the CUDA operations share: the CPU backend to compare with, and the comparison
// in every order of threads.
//
// The tests go through Backend's memory alone, so they also compile against the real device layer.
#pragma once

#include "host/cuda_backend.h"
#include "tests/backend/memory.h"
#include "tests/simt/arrange.h"

namespace duplex::simt_tests {

using backend_tests::Deviation;
using backend_tests::HostTape;
using backend_tests::kBf16Unit;
using backend_tests::kUnit;
using backend_tests::Memory;
using backend_tests::n_different;
using backend_tests::Random;
using backend_tests::random_rows;
using backend_tests::RowBuffer;

// "portable" does not fuse multiply-adds, so it has other bits.
inline bool has_fused_cpu() { return backend_tests::instruction_sets().back() != "portable"; }

// fn(backend) for a CUDA backend in every order of threads.
template <class Fn>
void in_every_order(const Fn& fn) {
  for (const simt::Order order : kOrders) {
    CAPTURE(static_cast<int>(order));
    const Arrange arrange(order);
    cuda::CudaBackend backend({});
    fn(backend);
  }
}

// run(backend) gives rows; the CUDA backend's are the CPU backend's, byte for byte.
template <class Run>
void check_same_bytes(const Run& run) {
  if (!has_fused_cpu()) return;
  CpuBackend cpu({1, ""});
  const RowBuffer expected = run(cpu);
  in_every_order([&](Backend& backend) { CHECK(n_different(run(backend), expected) == 0); });
}

}  // namespace duplex::simt_tests
