#include "backend/sampling.h"

#include <cmath>

#include "core/error.h"

namespace duplex {

void SamplingParams::validate() const {
  check(std::isfinite(temperature) && temperature >= 0, "temperature: expected 0 or more, found ",
        temperature);
  check(top_k >= 0, "top_k: expected 0 (all) or more, found ", top_k);
  check(top_p > 0 && top_p <= 1, "top_p: expected a number in (0, 1], found ", top_p);
}

}  // namespace duplex
