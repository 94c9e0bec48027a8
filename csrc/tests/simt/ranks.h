// What the tests of sums over ranks share: groups of emulated GPUs, and a scene that every rank
// computes, with the CPU backend's bytes of it.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "kernels/all_reduce.h"
#include "kernels/launchers.h"
#include "tests/simt/fixtures.h"
#include "tests/simt/streams.h"
#include "tests/simt/system_memory.h"

namespace duplex::simt_tests {

using cuda::Exchanges;
using cuda::Group;

// Memory of one rank, given back at the end.
class Device {
 public:
  Device() = default;
  ~Device() {
    for (void* const memory : all_) runtime.release(memory);
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  void* allocate(std::size_t bytes) { return all_.emplace_back(runtime.allocate(bytes)); }
  template <class T>
  T* put(const std::vector<T>& values) {
    auto* const memory = static_cast<T*>(allocate(values.size() * sizeof(T)));
    std::memcpy(static_cast<void*>(memory), values.data(), values.size() * sizeof(T));
    return memory;
  }

  cuda::Runtime runtime;

 private:
  std::vector<void*> all_;
};

// One lane of a group: the memory of each rank, and what its kernels are told.
struct Lane {
  Lane(int n_ranks, std::int64_t buffer_bytes, bool has_multicast, std::int32_t n_blocks = 2,
       std::uint64_t wait_limit = 200'000)
      : devices(static_cast<std::size_t>(n_ranks)), groups(static_cast<std::size_t>(n_ranks)) {
    const auto bytes = static_cast<std::size_t>(cuda::lane_bytes(buffer_bytes));
    std::vector<std::byte*> memories;
    for (Device& device : devices) {
      memories.push_back(static_cast<std::byte*>(device.allocate(bytes)));
      std::memset(memories.back() + cuda::kPadBytes, 0xff, bytes - cuda::kPadBytes);
    }
    if (has_multicast) multicast = std::make_unique<simt::Multicast>(memories, bytes);
    for (std::size_t r = 0; r < devices.size(); ++r) {
      Group& group = groups[r];
      group.rank = static_cast<std::int32_t>(r);
      group.n_ranks = n_ranks;
      group.n_blocks = n_blocks;
      group.own = memories[r];
      std::copy(memories.begin(), memories.end(), group.peers);
      group.multicast = multicast == nullptr ? nullptr : multicast->address();
      group.buffer_bytes = buffer_bytes;
      group.state = devices[r].put(std::vector<cuda::GroupState>(1));
      group.report = devices[r].put(std::vector<cuda::WaitReport>(1));
      group.wait_limit_ns = wait_limit;
    }
  }
  std::vector<Device> devices;
  std::unique_ptr<simt::Multicast> multicast;
  std::vector<Group> groups;
};

// A call of conv_add_norm on the sum of parts: two streams in one batch.
struct Scene {
  std::int32_t n_ranks, width, kernel;
  std::int32_t n_rows[2];
  std::int64_t position[2];
  DType dtype = DType::kF32;

  std::int32_t total() const { return n_rows[0] + n_rows[1]; }
  std::int32_t padded() const { return static_cast<std::int32_t>(round_up(width, kColumnAlign)); }
};

// A rank's copy of all that a scene needs; on the host's memory, so the CPU can compute it too.
class Place {
 public:
  static constexpr std::int64_t kOffset = 64;  // of the convolution in a block of the tape

  Place(const Scene& of, int rank, std::uint32_t seed) : scene(of) {
    Random random(seed);
    const std::size_t n = floats(scene.total());
    for (int r = 0; r < scene.n_ranks; ++r) {
      const std::vector<float> part = normals(random, scene.total());
      if (sum_.empty())
        sum_ = part;
      else
        for (std::size_t i = 0; i < n; ++i) sum_[i] += part[i];
      if (r == rank) part_ = device_.put(part);
    }
    hidden_before_ = normals(random, scene.total());
    hidden_ = device_.put(hidden_before_);
    weight_ = device_.put(normals(random, scene.kernel));
    norm_ = device_.put(normals(random, 1));
    out_bytes_ = n * dtype_bytes(scene.dtype);
    out_ = static_cast<std::byte*>(device_.allocate(out_bytes_));
    gathered_ = device_.put(std::vector<float>(n));
    share_ = device_.put(std::vector<float>(n));
    for (std::size_t s = 0; s < 2; ++s) put_tape(s, random);
    segments_ = device_.put(std::vector<Segment>{segment(0), segment(1)});
  }

  // As before the call.
  void reset() {
    std::memcpy(hidden_, hidden_before_.data(), hidden_before_.size() * sizeof(float));
    std::memset(out_, 0, out_bytes_);
    for (std::size_t s = 0; s < 2; ++s)
      std::memcpy(tape_[s], tape_before_[s].data(), tape_before_[s].size());
  }
  // All that the call wrote.
  std::vector<std::byte> result() const {
    std::vector<std::byte> all;
    const auto append = [&all](const void* from, std::size_t bytes) {
      const auto* const begin = static_cast<const std::byte*>(from);
      all.insert(all.end(), begin, begin + bytes);
    };
    append(hidden_, hidden_before_.size() * sizeof(float));
    append(out_, out_bytes_);
    for (std::size_t s = 0; s < 2; ++s) append(tape_[s], tape_before_[s].size());
    return all;
  }
  std::vector<std::byte> expected() {
    CpuBackend cpu({1, ""});
    ConvAddNormArgs args = op();
    args.parts[0] = device_.put(sum_);
    reset();
    cpu.conv_add_norm(args);
    return result();
  }

  ConvAddNormArgs op() const {
    return {.segments = {segments_, scene.n_rows[1] == 0 ? 1 : 2, scene.total()},
            .parts = {},
            .n_parts = 1,
            .x_stride = scene.padded(),
            .scale = 0.7f,
            .conv = {weight_, kOffset, scene.padded()},
            .kernel = scene.kernel,
            .hidden = hidden_,
            .hidden_stride = scene.padded(),
            .norm = norm_,
            .eps = 1e-6f,
            .width = scene.width,
            .out = {out_, scene.padded(), scene.dtype}};
  }
  void all_reduce(const Group& group, Exchanges how) {
    cuda::launch_all_reduce(device_.runtime, all_reduce_args(group), how);
  }
  cuda::AllReduceArgs all_reduce_args(const Group& group) const {
    return {group, part_, scene.padded(), op(), {norm_, 4 * std::int64_t{scene.padded()}}};
  }
  // The same in three launches, the sum by way of shares.
  void scatter_and_gather(const Group& group) {
    const std::int64_t n_words = std::int64_t{scene.total()} * scene.padded() / 4;
    cuda::launch_reduce_scatter(device_.runtime, {group, part_, share_, n_words, {}});
    cuda::launch_all_gather(device_.runtime, {group, share_, gathered_, n_words, {}});
    ConvAddNormArgs args = op();
    args.parts[0] = gathered_;
    cuda::launch_conv_add_norm(device_.runtime, args);
  }
  cuda::Runtime& runtime() { return device_.runtime; }

  Scene scene;

 private:
  std::size_t floats(std::int32_t n_rows) const {
    return static_cast<std::size_t>(n_rows) * static_cast<std::size_t>(scene.padded());
  }
  std::vector<float> normals(Random& random, std::int32_t n_rows) const {
    std::vector<float> rows(floats(n_rows), 0.0f);
    for (std::size_t i = 0; i < rows.size(); ++i)
      if (i % static_cast<std::size_t>(scene.padded()) < static_cast<std::size_t>(scene.width))
        rows[i] = random.normal();
    return rows;
  }
  // What earlier calls left, NaN where they left nothing.
  void put_tape(std::size_t s, Random& random) {
    const std::int64_t block_bytes = kOffset + 4 * scene.padded();
    HostTape tape(scene.position[s] + scene.n_rows[s], block_bytes);
    for (std::int64_t p = std::max<std::int64_t>(scene.position[s] - 8, 0); p < scene.position[s];
         ++p) {
      const std::vector<float> row = normals(random, 1);
      std::memcpy(tape.view.block(p) + kOffset, row.data(), row.size() * sizeof(float));
    }
    tape_before_[s] = tape.memory;
    tape_[s] = device_.put(tape.memory);
    view_[s] = tape.view;
    view_[s].base = tape_[s];
  }
  Segment segment(std::size_t s) const {
    return {.row_begin = s == 0 ? 0 : scene.n_rows[0],
            .n_rows = scene.n_rows[s],
            .position = scene.position[s],
            .global = view_[s],
            .local = {},
            .conv = view_[s]};
  }

  Device device_;
  std::vector<float> sum_, hidden_before_;
  float *part_ = nullptr, *hidden_ = nullptr, *weight_ = nullptr, *norm_ = nullptr;
  float *gathered_ = nullptr, *share_ = nullptr;
  std::byte* out_ = nullptr;
  std::size_t out_bytes_ = 0;
  std::vector<std::byte> tape_before_[2];
  std::byte* tape_[2] = {};
  TapeView view_[2];
  Segment* segments_ = nullptr;
};

}  // namespace duplex::simt_tests
