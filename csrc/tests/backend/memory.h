// Memory of any backend for a test of one operation, and the comparison of what comes back.
#pragma once

#include <memory>
#include <vector>

#include "tests/backend/fixtures.h"

namespace duplex::backend_tests {

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

}  // namespace duplex::backend_tests
