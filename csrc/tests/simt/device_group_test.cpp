// Ranks with a GPU each, as threads: what they share, and that one which is gone ends the kernels
// that wait for it. Whole engines of such ranks, as processes:
// python_tests/parallel/test_ranks_cuda_host.py.
#include <chrono>
#include <cstdlib>
#include <thread>
#include <vector>

#include "tests/backend/fixtures.h"
#include "tests/simt/device_ranks.h"
#include "tests/simt/fixtures.h"
#include "tests/simt/rank_scene.h"

namespace duplex::simt_tests {
namespace {

float logit(int rank, std::int64_t row, std::int64_t column) {
  return static_cast<float>(10'000 * rank + 100 * row + column);
}

// More rows than are gathered at once, of slices that are not equally wide.
TEST_CASE("cuda: all_reduce group: slices of all ranks come together at rank 0", "[simt][groups]") {
  const int n = GENERATE(2, 4);
  const char* const transport = GENERATE("nvls", "p2p");
  Ranks ranks(n);
  ExchangeOptions options = kOptions;
  options.transport = transport;
  ranks.connect(options);
  REQUIRE(ranks.all_ended_well());
  std::vector<Slice> slices;
  for (std::int64_t first = 0; std::ssize(slices) < n; first += slices.back().n)
    slices.push_back({first, 30 - std::ssize(slices)});
  const std::int64_t n_columns = slices.back().first + slices.back().n;
  constexpr std::int32_t kRows = 11;
  std::vector<float> found(static_cast<std::size_t>(kRows * n_columns));
  ranks.run([&](int r, cuda::CudaBackend& backend) {
    check(backend.transport() == transport, "found ", backend.transport());
    const auto exchange = backend.create_exchange(nullptr);
    std::vector<float> rows;
    for (std::int64_t row = 0; row < kRows; ++row)
      for (std::int64_t column = 0; column < options.gather_stride; ++column)
        rows.push_back(logit(r, row, column));
    const auto out = backend.allocate(found.size() * sizeof(float));
    for (int time = 0; time < 3; ++time) {
      backend.write(exchange->mine(), rows.data(), rows.size() * sizeof(float));
      exchange->gather(backend, {.n_rows = kRows,
                                 .stride = options.gather_stride,
                                 .slices = slices.data(),
                                 .out = r == 0 ? static_cast<float*>(out->data()) : nullptr,
                                 .out_stride = n_columns});
    }
    if (r == 0)
      backend.read(found.data(), out->data(), found.size() * sizeof(float));
    else
      backend.finish();
  });
  CHECK(ranks.all_ended_well());
  int n_wrong = 0;
  for (int r = 0; r < n; ++r) {
    const Slice& slice = slices[static_cast<std::size_t>(r)];
    for (std::int64_t row = 0; row < kRows; ++row)
      for (std::int64_t column = 0; column < slice.n; ++column)
        n_wrong += found[static_cast<std::size_t>(row * n_columns + slice.first + column)] !=
                   logit(r, row, column);
  }
  CHECK(n_wrong == 0);
}

// Each rank has several parts: all of them at once where a pass has few rows, else one by one. The
// second time the pass is recorded.
TEST_CASE("cuda: all_reduce group: ranks may have several parts each", "[simt][groups]") {
  if (!has_fused_cpu()) return;
  const int n = GENERATE(2, 4);
  const char* const transport = GENERATE("nvls", "p2p");
  const int n_parts = 8 / n;
  for (const Scene& scene : scenes_of(8)) {
    const SceneData data(scene, 51);
    const std::int64_t part = scene.total() * scene.padded();
    const std::int64_t part_stride = part + 16;
    for (const std::int64_t most : {part_stride, 2 * part_stride, 8 * part_stride}) {
      CAPTURE(n, transport, scene.width, most);
      Ranks ranks(n);
      ExchangeOptions options = kOptions;
      options.transport = transport;
      options.gather_stride = 4;
      options.n_parts = n_parts;
      options.part_stride = most;
      ranks.connect(options);
      REQUIRE(ranks.all_ended_well());
      std::vector<int> n_wrong(static_cast<std::size_t>(n), 0);
      ranks.run([&](int r, cuda::CudaBackend& backend) {
        const auto exchange = backend.create_exchange(nullptr);
        const auto memory = backend.allocate(data.bytes());
        auto* const base = static_cast<std::byte*>(memory->data());
        const std::vector<std::byte> image = data.image(base);
        for (int p = 0; p < n_parts; ++p)
          backend.write(static_cast<float*>(exchange->mine()) + p * part_stride,
                        data.part(r * n_parts + p).data(),
                        static_cast<std::size_t>(part) * sizeof(float));
        ConvAddNormArgs args = data.op(base);
        args.n_parts = n_parts;
        const auto segments_at = reinterpret_cast<const std::byte*>(args.segments.data) - base;
        args.segments.data = reinterpret_cast<const Segment*>(image.data() + segments_at);
        for (int time = 0; time < 3; ++time) {
          backend.write(base, image.data(), image.size());
          backend.run_layers(args.segments, 1,
                             [&](std::int32_t) { exchange->add(backend, args, part_stride, {}); });
          std::vector<std::byte> result(data.written_bytes());
          backend.read(result.data(), base, result.size());
          n_wrong[static_cast<std::size_t>(r)] += result != data.expected();
        }
      });
      CHECK(ranks.all_ended_well());
      CHECK(n_wrong == std::vector<int>(static_cast<std::size_t>(n), 0));
    }
  }
}

// Half of the ranks come to a meeting, which a GPU would wait in for ever.
TEST_CASE("cuda: all_reduce group: who is gone ends the kernels of the others", "[simt][groups]") {
  Ranks ranks(4);
  ranks.connect();
  REQUIRE(ranks.all_ended_well());
  std::chrono::steady_clock::time_point failed_at;
  const std::vector<Slice> slices(4, Slice{0, 0});
  ranks.run([&](int r, cuda::CudaBackend& backend) {
    if (r == 3) {
      std::this_thread::sleep_for(std::chrono::milliseconds(30));
      failed_at = std::chrono::steady_clock::now();
      ranks.meetings.failed = 3;
    }
    if (r >= 2) return;
    const auto exchange = backend.create_exchange(nullptr);
    for (int time = 0; time < 3; ++time)
      exchange->gather(backend, {.n_rows = 1,
                                 .stride = kOptions.gather_stride,
                                 .slices = slices.data(),
                                 .out = nullptr,
                                 .out_stride = 0});
    backend.finish();
  });
  CHECK(std::chrono::steady_clock::now() - failed_at < std::chrono::seconds(1));
  for (const std::size_t r : {0u, 1u}) CHECK(ranks.errors[r] == "rank 3 has failed");
  // The GPUs are good for another group.
  ranks.meetings.failed = -1;
  ranks.connect();
  CHECK(ranks.all_ended_well());
}

TEST_CASE("cuda: all_reduce group: what cannot be is refused on every rank alike",
          "[simt][groups]") {
  Ranks three(3);
  three.connect();
  for (const std::string& error : three.errors)
    CHECK_THAT(error, Catch::Contains("expected 2, 4 or 8 GPUs, found 3"));
  ::setenv("DUPLEX_SIMT_MULTICAST", "0", 1);
  Ranks ranks(2);
  ExchangeOptions options = kOptions;
  options.transport = "nvls";
  ranks.connect(options);
  for (const std::string& error : ranks.errors)
    CHECK_THAT(error, Catch::Contains("'nvls' is not there: the GPU of rank 0 has no multicast"));
  ranks.connect();
  CHECK(ranks.all_ended_well());
  CHECK_THAT(ranks.backends[0]->transport(), Catch::StartsWith("p2p (no nvls: the GPU of rank 0"));
  ::unsetenv("DUPLEX_SIMT_MULTICAST");
  BackendOptions ninth;
  ninth.gpu = 8;
  CHECK_THROWS_WITH(cuda::CudaBackend(ninth), Catch::Contains("expected GPU 8, found 8 GPUs"));
}

}  // namespace
}  // namespace duplex::simt_tests
