// PageMemory on a GPU, with the driver's virtual memory management.
#pragma once

#include <memory>

#include "backend/page_memory.h"
#include "device/runtime.h"

namespace duplex::cuda {

std::size_t page_granularity_of(int device);
std::unique_ptr<PageMemory> create_cuda_page_memory(Runtime& runtime, int device,
                                                    std::size_t page_bytes, std::int64_t n_pages);

}  // namespace duplex::cuda
