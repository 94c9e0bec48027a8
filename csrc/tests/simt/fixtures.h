// What the tests of the CUDA operations share: the CPU backend to compare with, memory of either
// backend, and the comparison in every order of threads.
//
// The tests go through Backend's memory alone, so they also compile against the real device layer.
#pragma once

#include <memory>
#include <vector>

#include "host/cuda_backend.h"
#include "tests/backend/fixtures.h"
#include "tests/simt/arrange.h"

namespace duplex::simt_tests {

using backend_tests::Deviation;
using backend_tests::HostTape;
using backend_tests::kBf16Unit;
using backend_tests::kUnit;
using backend_tests::Random;
using backend_tests::random_rows;
using backend_tests::RowBuffer;

// "portable" does not fuse multiply-adds, so it has other bits.
inline bool has_fused_cpu() { return backend_tests::instruction_sets().back() != "portable"; }

inline std::size_t bytes_of(const RowBuffer& rows, DType dtype) {
  return static_cast<std::size_t>(rows.n_rows() * rows.stride()) * dtype_bytes(dtype);
}

// The memory of one operation on one backend: what was put there, and the way back.
class Memory {
 public:
  explicit Memory(Backend& backend) : backend_(backend) {}

  void* put(const void* data, std::size_t bytes) {
    void* const there = zeros(bytes);
    if (bytes > 0) backend_.write(there, data, bytes);
    return there;
  }
  void* zeros(std::size_t bytes) {
    buffers_.push_back(backend_.allocate(bytes));
    return buffers_.back()->data();
  }
  template <class T>
  T* put(const std::vector<T>& values) {
    return static_cast<T*>(put(values.data(), values.size() * sizeof(T)));
  }
  Rows put(RowBuffer& rows) {
    const DType dtype = rows.rows().dtype;
    return {put(rows.address(0), bytes_of(rows, dtype)), rows.stride(), dtype};
  }
  float* put_floats(RowBuffer& rows) { return static_cast<float*>(put(rows).data); }
  // The same tape there.
  TapeView put(const HostTape& tape) {
    TapeView view = tape.view;
    view.base = put(tape.memory);
    return view;
  }
  // Columns in as many equal runs as there are parts, apart where the backend wants them so.
  PackedMatrix pack(RowBuffer& source, const PackShape& shape, std::int64_t n_out,
                    std::int32_t n_parts = 1) {
    const std::int32_t n_runs = backend_.packs_parts_apart() ? n_parts : 1;
    PackShape run = shape;
    run.n_in /= n_runs;
    const std::int64_t n_in =
        round_up(div_up(run.n_in, run.in_group) * run.in_group_padded, kColumnAlign);
    const std::size_t bytes = backend_.packed_bytes(n_out, n_in, run.dtype);
    auto* const packed = static_cast<std::byte*>(zeros(static_cast<std::size_t>(n_runs) * bytes));
    for (std::int32_t i = 0; i < n_runs; ++i)
      REQUIRE(backend_.pack(
                  {source.address(0, i * run.n_in), source.rows().dtype, n_out, source.stride()},
                  run, 0, packed + static_cast<std::size_t>(i) * bytes) == -1);
    return {packed, static_cast<std::int32_t>(n_out), static_cast<std::int32_t>(n_runs * n_in),
            run.dtype};
  }
  void get(RowBuffer& rows, const void* from) {
    backend_.read(rows.address(0), from, bytes_of(rows, rows.rows().dtype));
  }
  void get(HostTape& tape, const TapeView& view) {
    backend_.read(tape.memory.data(), view.base, tape.memory.size());
  }

 private:
  Backend& backend_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
};

// Rows of `some` that are not the rows of `all` from `begin` on, byte for byte.
inline std::int64_t n_different(const RowBuffer& some, const RowBuffer& all,
                                std::int64_t begin = 0) {
  std::int64_t n = 0;
  for (std::int64_t row = 0; row < some.n_rows(); ++row)
    n += some.same_row(row, all, begin + row, some.stride()) ? 0 : 1;
  return n;
}

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
