#include "sequence/admission.h"

#include <string>

#include "core/error.h"

namespace duplex {

Promise admit(PagePool& pool, const SequenceLayout& layout, const Admission& wish) {
  const PagePool::Lock lock(pool.mutex());
  check<CapacityError>(wish.max_positions <= layout.lifetime_positions(), wish.what,
                       " with max_positions = ", wish.max_positions, ": the addresses reach ",
                       layout.lifetime_positions(), "; ask for fewer positions");
  const std::int64_t n_free = pool.n_unpromised();
  const std::int64_t window_pages = layout.window_pages();
  const std::int64_t growth_pages = layout.growth_pages(wish.max_positions) - wish.shared_pages;
  if (growth_pages + window_pages <= n_free)
    return pool.promise(growth_pages, window_pages, wish.what);
  const auto page_bytes = static_cast<std::int64_t>(layout.page_bytes);
  const std::int64_t fitting =
      (n_free - window_pages + wish.shared_pages) * layout.global.page_positions();
  const std::string advice = !layout.global.is_inert() && fitting >= wish.least_positions
                                 ? "max_positions <= " + std::to_string(fitting) + " would fit"
                                 : "close a session or create the engine with more memory";
  fail<CapacityError>(wish.what, " with max_positions = ", wish.max_positions, ": needs ",
                      (growth_pages + window_pages) * page_bytes, " bytes (",
                      growth_pages * page_bytes, " for growth, ", window_pages * page_bytes,
                      " for windows), ", n_free * page_bytes, " are free of promises; ", advice);
}

}  // namespace duplex
