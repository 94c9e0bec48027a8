// What goes to all ranks or comes to one: emulated GPUs in random interleavings, as in
// cuda_all_reduce_test.cpp.
#include <algorithm>
#include <bit>
#include <random>

#include "core/error.h"
#include "tests/simt/ranks.h"

namespace duplex::simt_tests {
namespace {

constexpr std::int64_t kMostWords = 24, kStride = 12, kOutStride = 100;

// A call that all ranks make, and what each of them has in the end.
class Call {
 public:
  enum class Kind : std::uint8_t { kBroadcast, kGather, kAllGather };
  Call(int n_ranks, std::mt19937& random)
      : kind_(static_cast<Kind>(random() % 3)), size_(1 + static_cast<int>(random() % 6)) {
    const bool is_gather = kind_ == Kind::kGather;
    std::uniform_int_distribution<int> width(1, kStride);
    const auto n_in = static_cast<std::size_t>(is_gather ? size_ * kStride : 4 * kMostWords);
    for (int r = 0; r < n_ranks; ++r) {
      std::vector<float>& in = in_.emplace_back(n_in);
      for (float& value : in) value = static_cast<float>(random() % 1000);
      in[1] = std::bit_cast<float>(0xfffffffeu);  // a token's bits may be any but one
      out_.emplace_back(is_gather ? 6 * kOutStride : 4 * kMostWords, -1.0f);
      const std::int64_t first = r == 0 ? 0 : slices_[r - 1].first + slices_[r - 1].n;
      slices_[r] = {first, width(random)};
    }
  }

  void launch(Device& device, const Group& group) {
    const auto r = static_cast<std::size_t>(group.rank);
    float *const in = in_[r].data(), *const out = out_[r].data();
    switch (kind_) {
      case Kind::kBroadcast:
        return cuda::launch_broadcast(device.runtime, {group, in, out, n_words(), {}});
      case Kind::kAllGather:
        return cuda::launch_all_gather(device.runtime,
                                       {group, in, out, group.n_ranks * std::int64_t{2}, {}});
      case Kind::kGather:
        break;
    }
    cuda::GatherSlicesArgs args{group, in, r == 0 ? out : nullptr, size_, kStride, kOutStride, {}};
    std::copy(std::begin(slices_), std::end(slices_), args.slices);
    cuda::launch_gather(device.runtime, args);
  }

  // Numbers that are not what they should be.
  int n_wrong() const {
    int n = 0;
    for (std::size_t r = 0; r < out_.size(); ++r) {
      std::vector<float> expected(out_[r].size(), -1.0f);
      if (kind_ == Kind::kBroadcast && r > 0)
        std::copy_n(in_[0].begin(), 4 * n_words(), expected.begin());
      for (std::size_t from = 0; from < in_.size(); ++from) {
        if (kind_ == Kind::kAllGather)
          std::copy_n(in_[from].begin(), 8, expected.begin() + 8 * static_cast<int>(from));
        for (int row = 0; kind_ == Kind::kGather && r == 0 && row < size_; ++row)
          std::copy_n(in_[from].begin() + row * kStride, slices_[from].n,
                      expected.begin() + row * kOutStride + slices_[from].first);
      }
      n += std::memcmp(out_[r].data(), expected.data(), expected.size() * sizeof(float)) != 0;
    }
    return n;
  }

 private:
  std::int64_t n_words() const { return 4 * size_; }

  Kind kind_;
  int size_;
  std::vector<std::vector<float>> in_, out_;
  Slice slices_[cuda::kMaxRanks] = {};
};

int n_wrong_in(int n_ranks, int n_interleavings, bool has_multicast, std::uint32_t seed) {
  const std::int64_t bytes = 16 * (n_ranks + n_ranks * 6 * kStride / 4);
  Lane lane(n_ranks, bytes, has_multicast);
  std::mt19937 random(seed);
  int n_wrong = 0;
  for (int i = 0; i < n_interleavings; ++i) {
    std::vector<Call> calls;
    for (int k = 0; k < 6; ++k) calls.emplace_back(n_ranks, random);
    std::vector<std::function<void()>> programs;
    for (const Group& group : lane.groups)
      programs.emplace_back([&] {
        for (Call& call : calls)
          call.launch(lane.devices[static_cast<std::size_t>(group.rank)], group);
      });
    simt::run_streams(programs, static_cast<std::uint32_t>(random()));
    for (const Call& call : calls) n_wrong += call.n_wrong();
  }
  return n_wrong;
}

TEST_CASE("cuda: root: what all get and what one gets, in random interleavings", "[simt][races]") {
  const bool has_multicast = GENERATE(true, false);
  CHECK(n_wrong_in(2, 100, has_multicast, 1) == 0);
  CHECK(n_wrong_in(4, 40, has_multicast, 2) == 0);
  CHECK(n_wrong_in(8, 8, has_multicast, 3) == 0);
}

TEST_CASE("root: thousands of interleavings", "[.][interleavings]") {
  const bool has_multicast = GENERATE(true, false);
  CHECK(n_wrong_in(2, 3000, has_multicast, 4) == 0);
  CHECK(n_wrong_in(4, 1000, has_multicast, 5) == 0);
  CHECK(n_wrong_in(8, 300, has_multicast, 6) == 0);
}

TEST_CASE("cuda: root: what does not fit is refused", "[simt]") {
  Lane lane(2, 16 * 10, false);
  cuda::Runtime& runtime = lane.devices[0].runtime;
  const Group& group = lane.groups[0];
  CHECK_THROWS_WITH(cuda::launch_broadcast(runtime, {group, {}, {}, 9, {}}),
                    Catch::Contains("broadcast: expected buffers of 176 bytes or more, found 160"));
  CHECK_THROWS_WITH(cuda::launch_broadcast(runtime, {group, {}, {}, 1, {nullptr, 8}}),
                    Catch::Contains("multiples of 16 bytes, found 8"));
  CHECK(cuda::most_gathered_rows(2, 160, 8) == 2);
  CHECK_THROWS_WITH(cuda::launch_gather(runtime, {group, {}, {}, 3, 8, 8, {}}),
                    Catch::Contains("gather: expected buffers of 224 bytes or more, found 160"));
  CHECK_THROWS_WITH(cuda::launch_gather(runtime, {group, {}, {}, 1, 6, 8, {}}),
                    Catch::Contains("a multiple of 4 floats, found 6"));
}

}  // namespace
}  // namespace duplex::simt_tests
