// Every page is one physical allocation of the driver, made when the engine starts, and can be
// mapped at any number of addresses. The driver's functions are looked up at run time, so that the
// library loads where there is no driver.
#include "device/page_memory.h"

#include <cuda.h>
#include <cudaTypedefs.h>

#include <limits>
#include <unordered_map>
#include <vector>

#include "core/error.h"
#include "core/types.h"
#include "device/driver.h"

namespace duplex::cuda {
namespace {

struct Driver {
  PFN_cuMemGetAllocationGranularity_v10020 granularity;
  PFN_cuMemCreate_v10020 create;
  PFN_cuMemRelease_v10020 release;
  PFN_cuMemAddressReserve_v10020 reserve;
  PFN_cuMemAddressFree_v10020 free;
  PFN_cuMemMap_v10020 map;
  PFN_cuMemUnmap_v10020 unmap;
  PFN_cuMemSetAccess_v10020 set_access;
};

const Driver& driver() {
  static const Driver functions = [] {
    Driver d{};
    look_up(d.granularity, "cuMemGetAllocationGranularity");
    look_up(d.create, "cuMemCreate");
    look_up(d.release, "cuMemRelease");
    look_up(d.reserve, "cuMemAddressReserve");
    look_up(d.free, "cuMemAddressFree");
    look_up(d.map, "cuMemMap");
    look_up(d.unmap, "cuMemUnmap");
    look_up(d.set_access, "cuMemSetAccess");
    return d;
  }();
  return functions;
}

template <class... Parts>
void check_driver(CUresult code, const Parts&... what) {
  check<CapacityError>(code == CUDA_SUCCESS, "page memory: ", what..., ": CUDA error ",
                       static_cast<int>(code));
}

CUmemAllocationProp on_device(int device) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
  return properties;
}

CUdeviceptr as_pointer(const std::byte* address) { return reinterpret_cast<CUdeviceptr>(address); }

class CudaPageMemory final : public PageMemory {
 public:
  CudaPageMemory(Runtime& runtime, int device, std::size_t page_bytes, std::int64_t n_pages)
      : runtime_(runtime), device_(device), page_bytes_(page_bytes) {
    const CUmemAllocationProp properties = on_device(device);
    pages_.reserve(static_cast<std::size_t>(n_pages));
    try {
      for (std::int64_t page = 0; page < n_pages; ++page) {
        CUmemGenericAllocationHandle handle;
        check_driver(driver().create(&handle, page_bytes, &properties, 0), "cannot allocate page ",
                     page, " of ", n_pages, " (", page_bytes,
                     " bytes each); give the engine less memory");
        pages_.push_back(handle);
      }
    } catch (...) {
      release_pages();
      throw;
    }
  }
  ~CudaPageMemory() override { release_pages(); }

  std::size_t page_bytes() const override { return page_bytes_; }
  std::int64_t n_pages() const override { return static_cast<std::int64_t>(pages_.size()); }

  std::byte* reserve_range(std::size_t bytes) override {
    CUdeviceptr start = 0;
    check_driver(driver().reserve(&start, bytes, page_bytes_alignment(), 0, 0), "cannot reserve ",
                 bytes, " bytes of addresses; open fewer sessions");
    return reinterpret_cast<std::byte*>(start);
  }

  void release_range(std::byte* base, std::size_t bytes) noexcept override {
    wait();
    for (auto at = mapped_.begin(); at != mapped_.end();) {
      const bool inside = at->first >= base && at->first < base + bytes;
      if (inside) driver().unmap(as_pointer(at->first), page_bytes_);
      at = inside ? mapped_.erase(at) : std::next(at);
    }
    driver().free(as_pointer(base), bytes);
  }

  void map(std::byte* address, PageId page) override {
    if (mapped_.contains(address)) unmap(address);
    mapped_.reserve(mapped_.size() + 1);
    check_driver(driver().map(as_pointer(address), page_bytes_, 0,
                              pages_[static_cast<std::size_t>(page)], 0),
                 "cannot map page ", page);
    const CUmemAccessDesc access{{CU_MEM_LOCATION_TYPE_DEVICE, device_},
                                 CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    const CUresult code = driver().set_access(as_pointer(address), page_bytes_, &access, 1);
    if (code != CUDA_SUCCESS) driver().unmap(as_pointer(address), page_bytes_);
    check_driver(code, "cannot make page ", page, " readable");
    mapped_.emplace(address, page);
  }

  void unmap(std::byte* address) noexcept override {
    if (mapped_.erase(address) == 0) return;
    wait();  // kernels on their way may still read there
    driver().unmap(as_pointer(address), page_bytes_);
  }

  void copy(std::byte* destination, const std::byte* source, std::size_t bytes) override {
    runtime_.copy(destination, source, bytes);
  }
  void read(void* host, const std::byte* source, std::size_t bytes) const override {
    runtime_.read(host, source, bytes);
  }
  void write(std::byte* destination, const void* host, std::size_t bytes) override {
    runtime_.write(destination, host, bytes);
  }
  // The page stays with the engine: to take it back from the driver could fail.
  void discard(PageId) noexcept override {}

 private:
  std::size_t page_bytes_alignment() const {
    return page_bytes_ & (~page_bytes_ + 1);  // the largest power of two that divides it
  }
  void wait() noexcept {
    try {
      runtime_.synchronize();
    } catch (...) {  // a failed kernel is reported by the next call that can throw
    }
  }
  void release_pages() noexcept {
    for (const CUmemGenericAllocationHandle handle : pages_) driver().release(handle);
  }

  Runtime& runtime_;
  int device_;
  std::size_t page_bytes_;
  std::vector<CUmemGenericAllocationHandle> pages_;
  std::unordered_map<std::byte*, PageId> mapped_;
};

}  // namespace

std::size_t page_granularity_of(int device) {
  const CUmemAllocationProp properties = on_device(device);
  std::size_t bytes = 0;
  check_driver(driver().granularity(&bytes, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
               "cannot ask for the size of a page");
  return bytes;
}

std::unique_ptr<PageMemory> create_cuda_page_memory(Runtime& runtime, int device,
                                                    std::size_t page_bytes, std::int64_t n_pages) {
  const std::size_t granularity = runtime.page_granularity();
  check(page_bytes > 0 && page_bytes % granularity == 0,
        "page_bytes: expected a positive multiple of ", granularity, " bytes, found ", page_bytes);
  check(n_pages > 0 && n_pages <= std::numeric_limits<PageId>::max(), "n_pages: expected 1 to ",
        std::numeric_limits<PageId>::max(), ", found ", n_pages);
  return std::make_unique<CudaPageMemory>(runtime, device, page_bytes, n_pages);
}

}  // namespace duplex::cuda
