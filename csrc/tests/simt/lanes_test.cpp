// Two lanes of the CUDA backend: each in a stream of its own, so whatever one lane needs of the
// other must be put in order. The streams are mixed as late, as early and as wildly as they may be.
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <numeric>
#include <semaphore>
#include <thread>
#include <vector>

#include "host/cuda_backend.h"
#include "tests/simt/arrange.h"
#include "tests/simt/queues.h"

namespace duplex::simt_tests {
namespace {

constexpr std::int32_t kWidth = 1024;  // of a row, with which a page begins
constexpr std::size_t kRowBytes = kWidth * sizeof(float);
constexpr std::size_t kPageBytes = std::size_t{2} << 20;

std::vector<float> numbers(float first) {
  std::vector<float> row(kWidth);
  std::iota(row.begin(), row.end(), first);
  return row;
}

// A lane, and an operation of it that writes x * scale: RMSNorm of a row whose mean square is one.
struct Lane {
  explicit Lane(Backend& of) : backend(of) {
    ones = backend.allocate(kRowBytes);
    const std::vector<float> row(kWidth, 1.0f);
    backend.write(ones->data(), row.data(), kRowBytes);
  }
  // to = from (a row of one value v > 0 becomes ones) times `weight`.
  void normalise(const void* from, const void* weight, void* to) {
    backend.norm({static_cast<const float*>(from),
                  kWidth,
                  static_cast<const float*>(weight),
                  0.0f,
                  kWidth,
                  1,
                  Activation::kNone,
                  {to, kWidth, DType::kF32}});
  }
  // The page becomes the row `weight`, by a kernel.
  void write(const void* weight, std::byte* page) { normalise(ones->data(), weight, page); }
  std::vector<float> read(const void* from) {
    std::vector<float> row(kWidth);
    backend.read(row.data(), from, kRowBytes);
    return row;
  }
  std::vector<float> scaled(const std::byte* page) {  // by a kernel, through the own memory
    const auto out = backend.allocate(kRowBytes);
    normalise(ones->data(), page, out->data());
    return read(out->data());
  }

  Backend& backend;
  std::unique_ptr<Buffer> ones;
};

// Two lanes and five pages, mapped one behind the other.
struct Scene {
  Scene() {
    pages = backend.create_page_memory(kPageBytes, 6);
    range = pages->reserve_range(6 * kPageBytes);
    for (int i = 0; i < 5; ++i) pages->map(page(i), i);
    weights = backend.allocate(kRowBytes);
    backend.write(weights->data(), numbers(1).data(), kRowBytes);
    background = backend.background_lane();
    here = std::make_unique<Lane>(backend);
    there = std::make_unique<Lane>(*background);
  }
  ~Scene() { pages->release_range(range, 6 * kPageBytes); }
  std::byte* page(int i) { return range + static_cast<std::size_t>(i) * kPageBytes; }

  cuda::CudaBackend backend{BackendOptions{}};
  std::unique_ptr<PageMemory> pages;
  std::byte* range = nullptr;
  std::unique_ptr<Buffer> weights;
  std::unique_ptr<Backend> background;
  std::unique_ptr<Lane> here, there;
};

// fn(scene) in every mixture of the two streams.
template <class Fn>
void in_every_mixture(const Fn& fn) {
  for (const simt::Order order : kOrders)
    for (std::uint32_t seed = 1; seed <= (order == simt::Order::kRandom ? 20u : 1u); ++seed) {
      CAPTURE(static_cast<int>(order), seed);
      const Arrange arrange(order, seed);
      Scene scene;
      fn(scene);
    }
}

TEST_CASE("cuda: weights of one lane are there for the next", "[simt][lanes]") {
  in_every_mixture([](Scene& scene) {
    CHECK(scene.there->read(scene.weights->data()) == numbers(1));
    const auto later = scene.background->background_lane();  // of what the other has on its way
    scene.there->write(scene.weights->data(), scene.page(0));
    const auto last = scene.background->background_lane();
    Lane lane(*last);
    CHECK(lane.scaled(scene.page(0)) == numbers(1));
  });
}

TEST_CASE("cuda: a page written in one lane, copied, is read in the other", "[simt][lanes]") {
  in_every_mixture([](Scene& scene) {
    scene.here->write(scene.weights->data(), scene.page(0));
    scene.pages->copy(scene.page(1), scene.page(0), kRowBytes);
    scene.here->normalise(scene.here->ones->data(), scene.here->ones->data(), scene.page(0));
    CHECK(scene.there->scaled(scene.page(1)) == numbers(1));
    CHECK(scene.here->scaled(scene.page(0)) == std::vector<float>(kWidth, 1.0f));
  });
}

TEST_CASE("cuda: pages are written and read by the host between all lanes", "[simt][lanes]") {
  in_every_mixture([](Scene& scene) {
    const std::vector<float> first = numbers(5), second = numbers(9);
    scene.pages->write(scene.page(2), first.data(), kRowBytes);
    scene.there->write(scene.page(2), scene.page(3));
    scene.pages->write(scene.page(2), second.data(), kRowBytes);
    std::vector<float> row(kWidth);
    scene.pages->read(row.data(), scene.page(3), kRowBytes);
    CHECK(row == first);
    CHECK(scene.here->scaled(scene.page(2)) == second);
  });
}

TEST_CASE("cuda: the host reads what the lanes were given to write", "[simt][lanes]") {
  in_every_mixture([](Scene& scene) {
    scene.here->write(scene.weights->data(), scene.page(0));
    scene.there->write(scene.weights->data(), scene.page(1));
    for (int i = 0; i < 2; ++i) {
      std::vector<float> row(kWidth);
      scene.pages->read(row.data(), scene.page(i), kRowBytes);
      CHECK(row == numbers(1));
    }
  });
}

// The page goes from one lane's address to the other's; the old address may hold another page.
TEST_CASE("cuda: an address loses its page when no lane is at work there", "[simt][lanes]") {
  in_every_mixture([](Scene& scene) {
    const std::vector<float> first = numbers(3), second = numbers(7);
    scene.pages->write(scene.page(0), first.data(), kRowBytes);
    scene.pages->write(scene.page(4), second.data(), kRowBytes);
    scene.there->write(scene.page(0), scene.page(1));  // on its way while the pages move
    scene.pages->map(scene.page(0), 4);                // instead of page 0
    scene.there->write(scene.page(0), scene.page(2));
    scene.pages->unmap(scene.page(0));
    scene.pages->map(scene.page(5), 0);
    scene.here->write(scene.weights->data(), scene.page(5));
    CHECK(scene.here->scaled(scene.page(1)) == first);
    CHECK(scene.here->scaled(scene.page(2)) == second);
    CHECK(scene.there->scaled(scene.page(5)) == numbers(1));
  });
}

TEST_CASE("cuda: pages copied and given back are not read too late", "[simt][lanes]") {
  in_every_mixture([](Scene& scene) {
    std::byte* const range = scene.pages->reserve_range(kPageBytes);
    scene.pages->map(range, 5);
    const std::vector<float> first = numbers(3);
    scene.pages->write(range, first.data(), kRowBytes);
    scene.pages->copy(scene.page(1), range, kRowBytes);
    scene.pages->release_range(range, kPageBytes);
    scene.pages->map(scene.page(5), 5);
    scene.there->write(scene.weights->data(), scene.page(5));
    CHECK(scene.here->scaled(scene.page(1)) == first);
    CHECK(scene.there->scaled(scene.page(5)) == numbers(1));
  });
}

// Pages go last, behind the lanes.
TEST_CASE("cuda: a page is copied before it goes, where no lane is left", "[simt][lanes]") {
  in_every_mixture([](Scene&) {
    auto backend = std::make_unique<cuda::CudaBackend>(BackendOptions{});
    const auto pages = backend->create_page_memory(kPageBytes, 2);
    // One stream alone would do everything at once here.
    const auto others = backend->create_page_memory(kPageBytes, 1);
    backend.reset();
    std::byte* const range = pages->reserve_range(2 * kPageBytes);
    for (int i = 0; i < 2; ++i) pages->map(range + i * kPageBytes, i);
    const std::vector<float> first = numbers(3);
    pages->write(range, first.data(), kRowBytes);
    pages->copy(range + kPageBytes, range, kRowBytes);
    pages->unmap(range);
    std::vector<float> row(first.size());
    pages->read(row.data(), range + kPageBytes, kRowBytes);
    CHECK(row == first);
    pages->release_range(range, 2 * kPageBytes);
  });
}

// Token ids go through a ring; each lane must have one of its own.
TEST_CASE("cuda: lanes hand over input side by side", "[simt][lanes]") {
  constexpr std::int32_t kIds = 200'000;
  in_every_mixture([](Scene& scene) {
    const std::vector<float> table(16 * 8, 1.0f), norm(16, 1.0f);
    std::vector<std::int32_t> ids(kIds, 3);
    std::vector<std::unique_ptr<Buffer>> buffers;
    const auto put = [&](Backend& backend, const std::vector<float>& values) {
      buffers.push_back(backend.allocate(values.size() * sizeof(float)));
      backend.write(buffers.back()->data(), values.data(), values.size() * sizeof(float));
      return static_cast<float*>(buffers.back()->data());
    };
    for (Backend* backend : {static_cast<Backend*>(&scene.backend), scene.background.get()}) {
      float* const out = put(*backend, std::vector<float>(16 * 4));
      for (std::int32_t id : {1, 2, 3, 4, 5}) {
        std::vector<float> rows(table);
        for (std::size_t i = 0; i < 16; ++i) rows[static_cast<std::size_t>(id) * 16 + i] = -1.0f;
        const std::int32_t four[] = {id, 0, id, 0};
        backend->embed_text(
            {four, put(*backend, rows), DType::kF32, put(*backend, norm), 0.0f, 16, 4, out, 16});
      }
      std::vector<float> found(16 * 4);
      backend->read(found.data(), out, found.size() * sizeof(float));
      for (std::size_t i = 0; i < found.size(); ++i) CHECK(found[i] == (i / 16 % 2 == 0 ? -1 : 1));
    }
  });
}

// ---- who may go on

// A pass of the lane, on a thread of its own, until end().
class LongPass {
 public:
  explicit LongPass(Backend& backend)
      : thread_([this, &backend] {
          backend.run_awake([this] {
            has_begun_.release();
            may_end_.acquire();
          });
        }) {
    has_begun_.acquire();
  }
  void end() {
    may_end_.release();
    thread_.join();
  }

 private:
  std::binary_semaphore has_begun_{0}, may_end_{0};
  std::thread thread_;
};

TEST_CASE("cuda: the background begins nothing while a pass is running", "[simt][lanes]") {
  Scene scene;
  std::atomic<bool> has_begun{false}, has_ended{false};
  LongPass pass(scene.backend);
  std::thread thinker([&] {
    has_begun = true;
    scene.there->write(scene.weights->data(), scene.page(0));
    has_ended = true;
  });
  while (!has_begun) std::this_thread::yield();
  scene.here->write(scene.weights->data(), scene.page(1));
  CHECK(scene.here->read(scene.page(1)) == numbers(1));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(!has_ended);
  pass.end();
  thinker.join();
  CHECK(scene.here->scaled(scene.page(1)) == numbers(1));
  scene.there->write(scene.weights->data(), scene.page(0));  // and it is free again
}

TEST_CASE("cuda: the background has two layers on their way, and stops between them",
          "[simt][lanes]") {
  const bool is_recorded = GENERATE(false, true);
  const Arrange arrange(simt::Order::kForward);
  Scene scene;
  constexpr std::int32_t kLayers = 6;
  std::atomic<int> n_begun{0};
  std::unique_ptr<LongPass> pass;
  std::atomic<bool> has_pass{false};
  const auto begin_pass = [&] {
    pass = std::make_unique<LongPass>(scene.backend);
    has_pass = true;
  };
  const Segment segment{
      .row_begin = 0, .n_rows = 1, .position = 0, .global = {}, .local = {}, .conv = {}};
  const auto run = [&] {
    scene.background->run_layers({&segment, 1, 1}, kLayers, [&](std::int32_t layer) {
      if (layer == 3 && !is_recorded) {
        CHECK(*reinterpret_cast<const float*>(scene.page(1)) == 1.0f);  // layer 1 is done
        CHECK(*reinterpret_cast<const float*>(scene.page(2)) != 1.0f);  // layer 2 is on its way
        begin_pass();
      }
      scene.there->write(scene.weights->data(), scene.page(layer % 5));
      ++n_begun;
    });
  };
  if (is_recorded) {
    run();
    run();  // makes the records
    begin_pass();
  }
  n_begun = 0;
  std::atomic<bool> has_ended{false};
  std::thread thinker([&] {
    run();
    has_ended = true;
  });
  while (!has_pass) std::this_thread::yield();
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  CHECK(n_begun == (is_recorded ? 0 : 3));
  CHECK(!has_ended);
  pass->end();
  thinker.join();
  CHECK(n_begun == (is_recorded ? 0 : kLayers));
  CHECK(scene.there->read(scene.page(0)) == numbers(1));
}

// ---- the streams themselves

TEST_CASE("streams are mixed, and kept in the order that waits ask for", "[simt][lanes]") {
  int n_mixed = 0;
  for (std::uint32_t seed = 0; seed < 20; ++seed) {
    const Arrange arrange(simt::Order::kRandom, seed);
    simt::Queues streams;
    const auto a = streams.open(), b = streams.open();
    std::vector<int> done;
    for (int i = 0; i < 4; ++i) {
      streams.give(a, [&, i] { done.push_back(i); });
      streams.give(b, [&, i] { done.push_back(10 + i); });
    }
    streams.wait_for(b, a);
    streams.give(b, [&] { done.push_back(20); });
    streams.finish(b, streams.n_given(*b));
    CHECK(done.size() == 9);
    CHECK(done.back() == 20);
    std::vector<int> of_a, of_b;
    for (const int n : done) (n < 10 ? of_a : of_b).push_back(n);
    CHECK(of_a == std::vector<int>{0, 1, 2, 3});
    CHECK(of_b == std::vector<int>{10, 11, 12, 13, 20});
    n_mixed += done != std::vector<int>{0, 10, 1, 11, 2, 12, 3, 13, 20};
  }
  CHECK(n_mixed > 10);
}

TEST_CASE("an error of deferred work stays", "[simt][lanes]") {
  simt::Queues streams;
  const auto a = streams.open(), b = streams.open();
  streams.give(a, [] { throw std::runtime_error("first"); });
  bool is_done = false;
  streams.give(b, [&] { is_done = true; });
  CHECK_NOTHROW(streams.finish(b, 1));
  CHECK(is_done);
  CHECK_THROWS_WITH(streams.finish(a, 1), "first");
  CHECK_THROWS_WITH(streams.finish(b, 1), "first");
}

}  // namespace
}  // namespace duplex::simt_tests
