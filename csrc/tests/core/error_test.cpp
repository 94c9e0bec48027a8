// How errors are raised (core/error.h).
#include "core/error.h"

#include <catch2/catch.hpp>

namespace duplex {
namespace {

TEST_CASE("fail builds its message from parts and throws the class asked for") {
  CHECK_THROWS_AS(fail("x"), InvalidArgument);
  CHECK_THROWS_AS(fail<CapacityError>("x"), CapacityError);
  CHECK_THROWS_WITH(fail<CheckpointError>("tensor '", "a", "': ", 3, " of ", 4.5, " rows"),
                    "tensor 'a': 3 of 4.5 rows");
}

TEST_CASE("check throws only when the condition does not hold") {
  CHECK_NOTHROW(check(true, "not seen"));
  CHECK_THROWS_AS(check(false, "seen"), InvalidArgument);
  CHECK_THROWS_AS(check<SessionBusy>(false, "seen"), SessionBusy);
}

TEST_CASE("every error is one of ours, and none is another") {
  CHECK_THROWS_AS(fail<BackendUnavailable>("x"), Error);
  CHECK_THROWS_AS(fail<SessionClosed>("x"), Error);
  CHECK_THROWS_AS(fail<SessionBusy>("x"), std::runtime_error);
  bool is_capacity_error = false;
  try {
    fail<InvalidArgument>("x");
  } catch (const CapacityError&) {
    is_capacity_error = true;
  } catch (const Error&) {
  }
  CHECK_FALSE(is_capacity_error);
}

}  // namespace
}  // namespace duplex
