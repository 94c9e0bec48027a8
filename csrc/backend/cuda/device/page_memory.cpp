// Every page is one physical allocation of the driver, made when the engine starts, and can be
// mapped at any number of addresses. The driver's functions are looked up at run time, so that the
// library loads where there is no driver.
#include "device/page_memory.h"

#include <cuda.h>
#include <cudaTypedefs.h>

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

class CudaPages final : public DevicePages {
 public:
  CudaPages(int device, std::size_t page_bytes, std::int64_t n_pages)
      : device_(device), page_bytes_(page_bytes) {
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
  ~CudaPages() override { release_pages(); }

  std::byte* reserve(std::size_t bytes) override {
    CUdeviceptr start = 0;
    check_driver(driver().reserve(&start, bytes, alignment(), 0, 0), "cannot reserve ", bytes,
                 " bytes of addresses; open fewer sessions");
    return reinterpret_cast<std::byte*>(start);
  }

  void free(std::byte* base, std::size_t bytes) noexcept override {
    driver().free(as_pointer(base), bytes);
  }

  void map(std::byte* address, PageId page) override {
    check_driver(driver().map(as_pointer(address), page_bytes_, 0,
                              pages_[static_cast<std::size_t>(page)], 0),
                 "cannot map page ", page);
    const CUmemAccessDesc access{{CU_MEM_LOCATION_TYPE_DEVICE, device_},
                                 CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    const CUresult code = driver().set_access(as_pointer(address), page_bytes_, &access, 1);
    if (code != CUDA_SUCCESS) unmap(address);
    check_driver(code, "cannot make page ", page, " readable");
  }

  void unmap(std::byte* address) noexcept override {
    driver().unmap(as_pointer(address), page_bytes_);
  }

 private:
  std::size_t alignment() const {
    return page_bytes_ & (~page_bytes_ + 1);  // the largest power of two that divides it
  }
  void release_pages() noexcept {
    for (const CUmemGenericAllocationHandle handle : pages_) driver().release(handle);
  }

  int device_;
  std::size_t page_bytes_;
  std::vector<CUmemGenericAllocationHandle> pages_;
};

}  // namespace

std::size_t page_granularity_of(int device) {
  const CUmemAllocationProp properties = on_device(device);
  std::size_t bytes = 0;
  check_driver(driver().granularity(&bytes, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
               "cannot ask for the size of a page");
  return bytes;
}

std::unique_ptr<DevicePages> create_cuda_pages(int device, std::size_t page_bytes,
                                               std::int64_t n_pages) {
  return std::make_unique<CudaPages>(device, page_bytes, n_pages);
}

}  // namespace duplex::cuda
