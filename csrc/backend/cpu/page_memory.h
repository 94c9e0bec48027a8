// Pages of one memory file, mapped wherever a tape wants them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "backend/page_memory.h"

namespace duplex {

// `page_bytes` is a multiple of the system page. Memory is used only for pages that were mapped.
// Throws InvalidArgument for impossible sizes, CapacityError when the system refuses.
std::unique_ptr<PageMemory> create_cpu_page_memory(std::size_t page_bytes, std::int64_t n_pages);

}  // namespace duplex
