// GPUs that meet by way of their hosts: the CPU's bytes, on any number of ranks, and no pass that
// is recorded. Whole engines of such ranks: python_tests/parallel/test_ranks_cuda_host.py.
#include <algorithm>
#include <memory>
#include <vector>

#include "tests/simt/fixtures.h"
#include "tests/simt/rank_scene.h"

namespace duplex::simt_tests {
namespace {

constexpr std::size_t kSlabFloats = 4096;

// The host of one rank, to whom the others have come already; what it sent to them.
class FakeHosts final : public SlabExchange {
 public:
  FakeHosts(int rank, int size) : rank_(rank) {
    for (int r = 0; r < size; ++r) slabs.emplace_back(kSlabFloats, -1.0f);
    for (const std::vector<float>& slab : slabs) pointers_.push_back(slab.data());
  }
  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(slabs.size()); }
  std::size_t slab_bytes() const override { return kSlabFloats * sizeof(float); }
  void* mine() override { return slabs[static_cast<std::size_t>(rank_)].data(); }
  std::span<const void* const> meet(std::size_t bytes) override {
    sent_bytes.push_back(bytes);
    return pointers_;
  }

  std::vector<std::vector<float>> slabs;
  std::vector<std::size_t> sent_bytes;

 private:
  int rank_;
  std::vector<const void*> pointers_;
};

// A GPU and its host; `hosts` is the exchange's.
struct Rank {
  Rank(int rank, int size) {
    auto made = std::make_unique<FakeHosts>(rank, size);
    hosts = made.get();
    exchange = backend.create_exchange(std::move(made));
  }
  // All parts at once, as many of each rank; this rank's on the GPU alone.
  void put_parts(const SceneData& data) {
    const int n_parts = data.scene.n_ranks / exchange->size();
    for (int i = 0; i < data.scene.n_ranks; ++i) {
      const std::vector<float>& part = data.part(i);
      const int rank = i / n_parts;
      const std::size_t at = static_cast<std::size_t>(i % n_parts) * part_stride(data);
      if (rank == exchange->rank())
        backend.write(static_cast<float*>(exchange->mine()) + at, part.data(),
                      part.size() * sizeof(float));
      else
        std::copy(
            part.begin(), part.end(),
            hosts->slabs[static_cast<std::size_t>(rank)].begin() + static_cast<std::ptrdiff_t>(at));
    }
  }
  static std::size_t part_stride(const SceneData& data) { return data.part(0).size() + 16; }

  cuda::CudaBackend backend{BackendOptions{}};
  FakeHosts* hosts;
  std::unique_ptr<Exchange> exchange;
};

// What a call leaves in the memory of the GPU.
std::vector<std::byte> add(Rank& rank, const SceneData& data) {
  const auto memory = rank.backend.allocate(data.bytes());
  auto* const base = static_cast<std::byte*>(memory->data());
  const std::vector<std::byte> image = data.image(base);
  rank.backend.write(base, image.data(), image.size());
  rank.put_parts(data);
  ConvAddNormArgs args = data.op(base);
  // What the host hands over with an operation lies in its memory.
  const auto segments_at = reinterpret_cast<const std::byte*>(args.segments.data) - base;
  args.segments.data = reinterpret_cast<const Segment*>(image.data() + segments_at);
  args.n_parts = data.scene.n_ranks / rank.exchange->size();
  rank.exchange->add(rank.backend, args, static_cast<std::int64_t>(Rank::part_stride(data)), {});
  std::vector<std::byte> result(data.written_bytes());
  rank.backend.read(result.data(), base, result.size());
  return result;
}

TEST_CASE("cuda: exchange by hosts: the sum of all ranks' parts is the CPU's", "[simt]") {
  if (!has_fused_cpu()) return;
  const int n = GENERATE(2, 3, 8);
  const int number = GENERATE_COPY(0, n - 1);
  Rank rank(number, n);
  std::uint32_t seed = 7;
  for (const Scene& scene : scenes_of(n)) {
    CAPTURE(n, number, scene.width);
    const SceneData data(scene, ++seed);
    CHECK(add(rank, data) == data.expected());
    CHECK(rank.hosts->sent_bytes.back() == Rank::part_stride(data) * sizeof(float));
  }
}

TEST_CASE("cuda: exchange by hosts: ranks may have several parts each", "[simt]") {
  if (!has_fused_cpu()) return;
  const int n = GENERATE(2, 4);
  Rank rank(n - 1, n);
  std::uint32_t seed = 17;
  for (const Scene& scene : scenes_of(8)) {
    CAPTURE(n, scene.width);
    const SceneData data(scene, ++seed);
    CHECK(add(rank, data) == data.expected());
  }
}

TEST_CASE("cuda: exchange by hosts: no rows are no meeting", "[simt]") {
  Rank rank(0, 2);
  const ConvAddNormArgs nothing{};
  rank.exchange->add(rank.backend, nothing, 0, {});
  CHECK(rank.hosts->sent_bytes.empty());
}

TEST_CASE("cuda: exchange by hosts: slices of all ranks come together at rank 0", "[simt]") {
  constexpr std::int32_t kRows = 3, kStride = 8, kOutStride = 16;
  const Slice slices[] = {{0, 5}, {5, 8}};
  const int number = GENERATE(0, 1);
  Rank rank(number, 2);
  std::vector<float> own, other(kRows * kStride, 500.0f);
  for (int i = 0; i < kRows * kStride; ++i) own.push_back(static_cast<float>(i));
  std::copy(other.begin(), other.end(),
            rank.hosts->slabs[static_cast<std::size_t>(1 - number)].begin());
  rank.backend.write(rank.exchange->mine(), own.data(), own.size() * sizeof(float));
  const auto out = rank.backend.allocate(kRows * kOutStride * sizeof(float));
  auto* const at = static_cast<float*>(out->data());
  rank.exchange->gather(rank.backend, {.n_rows = kRows,
                                       .stride = kStride,
                                       .slices = slices,
                                       .out = number == 0 ? at : nullptr,
                                       .out_stride = kOutStride});
  CHECK(rank.hosts->sent_bytes == std::vector{own.size() * sizeof(float)});
  std::vector<float> found(kRows * kOutStride), expected(kRows * kOutStride, 0.0f);
  rank.backend.read(found.data(), at, found.size() * sizeof(float));
  for (std::size_t row = 0; row < kRows && number == 0; ++row) {
    std::copy_n(own.begin() + static_cast<std::ptrdiff_t>(row * kStride), 5,
                expected.begin() + static_cast<std::ptrdiff_t>(row * kOutStride));
    std::fill_n(expected.begin() + static_cast<std::ptrdiff_t>(row * kOutStride + 5), 8, 500.0f);
  }
  CHECK(found == expected);
  CHECK(std::equal(own.begin(), own.end(), static_cast<float*>(rank.hosts->mine())));
}

// The host takes part in every layer of every pass, on both lanes.
TEST_CASE("cuda: exchange by hosts: no pass is recorded", "[simt]") {
  constexpr std::int32_t kLayers = 3;
  cuda::CudaBackend backend{BackendOptions{}};
  const auto background = backend.background_lane();
  const Segment segment{
      .row_begin = 0, .n_rows = 1, .position = 0, .global = {}, .local = {}, .conv = {}};
  for (Backend* lane : {static_cast<Backend*>(&backend), background.get()}) {
    const auto exchange = lane->create_exchange(std::make_unique<FakeHosts>(0, 2));
    int n_layers = 0;
    for (int pass = 0; pass < 4; ++pass)
      lane->run_layers({&segment, 1, 1}, kLayers, [&](std::int32_t) { ++n_layers; });
    CHECK(n_layers == 4 * kLayers);
  }
}

}  // namespace
}  // namespace duplex::simt_tests
