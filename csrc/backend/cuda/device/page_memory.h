// Physical pages of a GPU and the addresses where they are mapped. Nothing here waits for what
// runs: host/shared_pages.h does. csrc/tests/simt/device/ has the host's twin.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "backend/page_memory.h"

namespace duplex::cuda {

class DevicePages {
 public:
  virtual ~DevicePages() = default;

  virtual std::byte* reserve(std::size_t bytes) = 0;  // addresses; throws CapacityError
  virtual void free(std::byte* base, std::size_t bytes) noexcept = 0;  // nothing is mapped there
  virtual void map(std::byte* address, PageId page) = 0;               // where nothing is mapped
  virtual void unmap(std::byte* address) noexcept = 0;
};

std::size_t page_granularity_of(int device);
std::unique_ptr<DevicePages> create_cuda_pages(int device, std::size_t page_bytes,
                                               std::int64_t n_pages);

}  // namespace duplex::cuda
