// The arithmetic of promises: what is admitted, what comes back, and what a refusal leaves behind.
#include "sequence/page_pool.h"

#include <catch2/catch.hpp>

#include "tests/sequence/fixtures.h"

namespace duplex::sequence_tests {
namespace {

struct SmallPool {
  PagePool pool{create_cpu_page_memory(4096, 10)};
};

TEST_CASE_METHOD(SmallPool, "promises never exceed the pool") {
  Promise first = pool.promise(4, 2, "test");
  CHECK(pool.n_unpromised() == 4);
  CHECK_THROWS_AS(pool.promise(4, 1, "test"), CapacityError);
  CHECK(pool.stats().n_promised == 6);
  {
    const Promise second = pool.promise(3, 1, "test");
    CHECK(pool.n_unpromised() == 0);
    CHECK_THROWS_AS(first.extend(1, "test"), CapacityError);
    CHECK(first.growth_pages() == 4);
  }
  first.extend(4, "test");
  CHECK(pool.n_unpromised() == 0);
  const Promise moved = std::move(first);
  CHECK(moved.growth_pages() == 8);
  CHECK(pool.stats().n_promised == 10);
}

TEST_CASE_METHOD(SmallPool, "a growth page is a promise kept, and turns back into one") {
  Promise promise = pool.promise(2, 1, "test");
  const PageId page = promise.take(PageUse::kGrowth);
  CHECK(promise.growth_pages() == 1);
  CHECK(pool.stats().n_growth_used == 1);
  CHECK(pool.n_unpromised() == 7);
  promise.give_back(page);
  CHECK(promise.growth_pages() == 2);
  CHECK(pool.n_unpromised() == 7);

  const PageId a = promise.take(PageUse::kGrowth);
  const PageId b = promise.take(PageUse::kGrowth);
  CHECK_THROWS_AS(promise.take(PageUse::kGrowth), CapacityError);
  const PageId window = promise.take(PageUse::kWindow);
  CHECK(pool.stats().n_used == 3);
  for (const PageId held : {a, b, window}) promise.give_back(held);
  CHECK(pool.stats().n_promised == 3);
  CHECK(pool.stats().n_used == 0);
}

TEST_CASE_METHOD(SmallPool, "a shared page is used once and until its last holder lets go") {
  Promise first = pool.promise(1, 0, "test");
  Promise second = pool.promise(0, 0, "test");
  const PageId page = first.take(PageUse::kGrowth);
  CHECK_FALSE(pool.is_shared(page));
  pool.add_ref(page);
  CHECK(pool.is_shared(page));
  CHECK(pool.stats().n_growth_used == 1);
  first.give_back(page);
  CHECK(first.growth_pages() == 0);
  CHECK(pool.stats().n_growth_used == 1);
  second.give_back(page);
  CHECK(second.growth_pages() == 1);
  CHECK(pool.stats().n_growth_used == 0);
}

}  // namespace
}  // namespace duplex::sequence_tests
