// A scene that every rank of a group computes, with the CPU backend's bytes of it. All memory goes
// through Runtime, so the host's twin and a GPU compute the same scenes.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "kernels/all_reduce.h"
#include "kernels/launchers.h"
#include "tests/backend/fixtures.h"

namespace duplex::simt_tests {

using cuda::Exchanges;
using cuda::Group;

// A call of conv_add_norm on the sum of parts: two streams in one batch.
struct Scene {
  std::int32_t n_ranks, width, kernel;
  std::int32_t n_rows[2];
  std::int64_t position[2];
  DType dtype = DType::kF32;

  std::int32_t total() const { return n_rows[0] + n_rows[1]; }
  std::int32_t padded() const { return static_cast<std::int32_t>(round_up(width, kColumnAlign)); }
};

inline std::vector<Scene> scenes_of(int n_ranks) {
  return {{n_ranks, 24, 4, {1, 1}, {0, 5}, DType::kF32},
          {n_ranks, 40, 3, {4, 1}, {2, 63}, DType::kBF16},
          {n_ranks, 70, 1, {2, 3}, {64, 0}, DType::kF32},
          {n_ranks, 120, 4, {1, 0}, {7, 0}, DType::kBF16}};
}

// note: a row more than there are, since one row alone may need less.
inline std::int64_t largest_buffer(const std::vector<Scene>& scenes) {
  std::int64_t bytes = 0;
  for (const Scene& scene : scenes)
    for (const Exchanges how : {Exchanges::kOneShot, Exchanges::kTwoShot})
      bytes = std::max(bytes,
                       cuda::all_reduce_bytes(scene.n_ranks, scene.total() + 1, scene.width, how));
  return bytes;
}

// A way to the sum: with multicast or without.
enum class Way : std::uint8_t { kOneShot, kTwoShot, kShares };
inline constexpr Way kWays[] = {Way::kOneShot, Way::kTwoShot, Way::kShares};

// What all ranks have before the call, each rank's part, and what all of them have after it.
class SceneData {
 public:
  SceneData(const Scene& of, std::uint32_t seed) : scene(of) {
    backend_tests::Random random(seed);
    for (int r = 0; r < scene.n_ranks; ++r) parts_.push_back(normals(random, scene.total()));
    add(hidden_at_, normals(random, scene.total()));
    add(out_at_, std::vector<std::byte>(floats(scene.total()) * dtype_bytes(scene.dtype)));
    for (std::size_t s = 0; s < 2; ++s) add_tape(s, random);
    written_bytes_ = before_.size();
    add(weight_at_, normals(random, scene.kernel));
    add(norm_at_, normals(random, 1));
    add(segments_at_, std::vector<std::byte>(2 * sizeof(Segment)));
  }

  // All but the parts, for memory that begins at `base`: first what a call writes.
  std::vector<std::byte> image(std::byte* base) const {
    std::vector<std::byte> bytes = before_;
    const Segment segments[] = {segment(base, 0), segment(base, 1)};
    std::memcpy(bytes.data() + segments_at_, segments, sizeof segments);
    return bytes;
  }
  std::size_t bytes() const { return before_.size(); }
  std::size_t written_bytes() const { return written_bytes_; }
  const std::vector<float>& part(int rank) const { return parts_[static_cast<std::size_t>(rank)]; }

  ConvAddNormArgs op(std::byte* base) const {
    const auto at = [base](std::size_t offset) { return reinterpret_cast<float*>(base + offset); };
    return {.segments = {reinterpret_cast<Segment*>(base + segments_at_),
                         scene.n_rows[1] == 0 ? 1 : 2, scene.total()},
            .parts = {},
            .n_parts = 1,
            .x_stride = scene.padded(),
            .scale = 0.7f,
            .conv = {at(weight_at_), kOffset, scene.padded()},
            .kernel = scene.kernel,
            .hidden = at(hidden_at_),
            .hidden_stride = scene.padded(),
            .norm = at(norm_at_),
            .eps = 1e-6f,
            .width = scene.width,
            .out = {base + out_at_, scene.padded(), scene.dtype}};
  }
  // What the CPU backend writes.
  std::vector<std::byte> expected() const {
    std::vector<float> sum = parts_[0];
    for (std::size_t r = 1; r < parts_.size(); ++r)
      for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += parts_[r][i];
    std::vector<std::byte> memory(bytes() + kAlign);
    std::byte* const base =
        memory.data() + kAlign - reinterpret_cast<std::uintptr_t>(memory.data()) % kAlign;
    const std::vector<std::byte> before = image(base);
    std::copy(before.begin(), before.end(), base);
    ConvAddNormArgs args = op(base);
    args.parts[0] = sum.data();
    CpuBackend({1, ""}).conv_add_norm(args);
    return {base, base + written_bytes_};
  }

  Scene scene;

 private:
  static constexpr std::int64_t kOffset = 64;  // of the convolution in a block of the tape
  static constexpr std::size_t kAlign = 256;

  std::size_t floats(std::int32_t n_rows) const {
    return static_cast<std::size_t>(n_rows) * static_cast<std::size_t>(scene.padded());
  }
  std::vector<float> normals(backend_tests::Random& random, std::int32_t n_rows) const {
    std::vector<float> rows(floats(n_rows), 0.0f);
    for (std::size_t i = 0; i < rows.size(); ++i)
      if (i % static_cast<std::size_t>(scene.padded()) < static_cast<std::size_t>(scene.width))
        rows[i] = random.normal();
    return rows;
  }
  // Behind what is there; NaN between them, for who reads too far.
  template <class T>
  void add(std::size_t& at, const std::vector<T>& values) {
    at = before_.size();
    const auto* const begin = reinterpret_cast<const std::byte*>(values.data());
    before_.insert(before_.end(), begin, begin + values.size() * sizeof(T));
    before_.resize((before_.size() / kAlign + 2) * kAlign, std::byte{0xff});
  }
  // What earlier calls left, NaN where they left nothing.
  void add_tape(std::size_t s, backend_tests::Random& random) {
    const std::int64_t block_bytes = kOffset + 4 * scene.padded();
    backend_tests::HostTape tape(scene.position[s] + scene.n_rows[s], block_bytes);
    for (std::int64_t p = std::max<std::int64_t>(scene.position[s] - 8, 0); p < scene.position[s];
         ++p) {
      const std::vector<float> row = normals(random, 1);
      std::memcpy(tape.view.block(p) + kOffset, row.data(), row.size() * sizeof(float));
    }
    add(tape_at_[s], tape.memory);
    view_[s] = tape.view;
  }
  Segment segment(std::byte* base, std::size_t s) const {
    TapeView tape = view_[s];
    tape.base = base + tape_at_[s];
    return {.row_begin = s == 0 ? 0 : scene.n_rows[0],
            .n_rows = scene.n_rows[s],
            .position = scene.position[s],
            .global = tape,
            .local = {},
            .conv = tape};
  }

  std::vector<std::vector<float>> parts_;
  std::vector<std::byte> before_;
  std::size_t written_bytes_ = 0;
  std::size_t hidden_at_ = 0, out_at_ = 0, tape_at_[2] = {};
  std::size_t weight_at_ = 0, norm_at_ = 0, segments_at_ = 0;
  TapeView view_[2];
};

// A rank's memory of a scene.
class Place {
 public:
  // Both must outlive it.
  Place(cuda::Runtime& stream, const SceneData& of, int rank) : data_(of), runtime_(stream) {
    const std::vector<float>& part = data_.part(rank);
    const std::size_t part_bytes = part.size() * sizeof(float);
    base_ = allocate<std::byte>(data_.bytes());
    for (float** const floats : {&part_, &gathered_, &share_})
      *floats = allocate<float>(part_bytes);
    const std::vector<std::byte> image = data_.image(base_);
    runtime_.write(base_, image.data(), image.size());
    runtime_.write(part_, part.data(), part_bytes);
    before_ = {image.begin(), image.begin() + static_cast<std::ptrdiff_t>(data_.written_bytes())};
    runtime_.synchronize();
  }
  ~Place() {
    for (void* const memory : all_) cuda::Runtime::release(memory);
  }
  Place(const Place&) = delete;
  Place& operator=(const Place&) = delete;

  // As before the call.
  void reset() { runtime_.write(base_, before_.data(), before_.size()); }
  // All that the call wrote.
  std::vector<std::byte> result() {
    std::vector<std::byte> bytes(data_.written_bytes());
    runtime_.read(bytes.data(), base_, bytes.size());
    return bytes;
  }
  // The same on the device: written() (written_bytes), and what reset() puts there.
  std::byte* written() const { return base_; }
  const std::vector<std::byte>& before() const { return before_; }

  void compute(const Group& group, Way way) {
    if (way == Way::kShares)
      scatter_and_gather(group);
    else
      all_reduce(group, way == Way::kOneShot ? Exchanges::kOneShot : Exchanges::kTwoShot);
  }
  void all_reduce(const Group& group, Exchanges how) {
    cuda::launch_all_reduce(runtime_, all_reduce_args(group), how);
  }
  cuda::AllReduceArgs all_reduce_args(const Group& group) const {
    const ConvAddNormArgs op = data_.op(base_);
    return {group, part_, op.x_stride, op, {op.norm, 4 * op.x_stride}};
  }
  // The same in three launches, the sum by way of shares.
  void scatter_and_gather(const Group& group) {
    ConvAddNormArgs args = data_.op(base_);
    const std::int64_t n_words = data_.scene.total() * args.x_stride / 4;
    cuda::launch_reduce_scatter(runtime_, {group, part_, share_, n_words, {}});
    cuda::launch_all_gather(runtime_, {group, share_, gathered_, n_words, {}});
    args.parts[0] = gathered_;
    cuda::launch_conv_add_norm(runtime_, args);
  }
  cuda::Runtime& runtime() { return runtime_; }

 private:
  template <class T>
  T* allocate(std::size_t bytes) {
    return static_cast<T*>(all_.emplace_back(runtime_.allocate(bytes)));
  }

  const SceneData& data_;
  cuda::Runtime& runtime_;
  std::vector<void*> all_;
  std::byte* base_ = nullptr;
  float *part_ = nullptr, *gathered_ = nullptr, *share_ = nullptr;
  std::vector<std::byte> before_;
};

// Scenes of one group: the places of every rank, and the bytes that all of them should end with, by
// scene.
struct World {
  using Runtimes = std::vector<std::shared_ptr<cuda::Runtime>>;  // of every rank
  World(Runtimes of, const std::vector<Scene>& all) : runtimes(std::move(of)), scenes(all) {
    for (std::size_t s = 0; s < scenes.size(); ++s) {
      data.push_back(std::make_unique<SceneData>(scenes[s], 100 + static_cast<std::uint32_t>(s)));
      expected.push_back(data[s]->expected());
      for (int r = 0; r < scenes[s].n_ranks; ++r)
        places.push_back(
            std::make_unique<Place>(*runtimes[static_cast<std::size_t>(r)], *data[s], r));
    }
  }
  Place& place(std::size_t scene, std::size_t rank) {
    return *places[scene * static_cast<std::size_t>(scenes[0].n_ranks) + rank];
  }

  Runtimes runtimes;
  std::vector<Scene> scenes;
  std::vector<std::unique_ptr<SceneData>> data;
  std::vector<std::unique_ptr<Place>> places;
  std::vector<std::vector<std::byte>> expected;
};

}  // namespace duplex::simt_tests
