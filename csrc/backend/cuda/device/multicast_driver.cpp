// The calls of multicast.h as the CUDA driver's.
#include <cuda.h>
#include <cudaTypedefs.h>
#include <unistd.h>

#include <cstring>

#include "device/driver.h"
#include "device/multicast.h"

namespace duplex::cuda {
namespace {

struct Functions {
  PFN_cuDeviceGetAttribute_v2000 attribute;
  PFN_cuMemGetAllocationGranularity_v10020 memory_granularity;
  PFN_cuMulticastGetGranularity_v12010 multicast_granularity;
  PFN_cuMulticastCreate_v12010 create_multicast;
  PFN_cuMulticastAddDevice_v12010 add_device;
  PFN_cuMulticastBindMem_v12010 bind;
  PFN_cuMulticastUnbind_v12010 unbind;
  PFN_cuMemCreate_v10020 create_memory;
  PFN_cuMemRelease_v10020 release;
  PFN_cuMemExportToShareableHandle_v10020 share;
  PFN_cuMemImportFromShareableHandle_v10020 import;
  PFN_cuMemAddressReserve_v10020 reserve;
  PFN_cuMemAddressFree_v10020 free;
  PFN_cuMemMap_v10020 map;
  PFN_cuMemUnmap_v10020 unmap;
  PFN_cuMemSetAccess_v10020 allow_access;
  PFN_cuMemsetD8_v3020 fill;
  PFN_cuStreamSynchronize_v2000 synchronize;

  Functions() {
    look_up(attribute, "cuDeviceGetAttribute", 2000);
    look_up(memory_granularity, "cuMemGetAllocationGranularity");
    look_up(multicast_granularity, "cuMulticastGetGranularity", 12010);
    look_up(create_multicast, "cuMulticastCreate", 12010);
    look_up(add_device, "cuMulticastAddDevice", 12010);
    look_up(bind, "cuMulticastBindMem", 12010);
    look_up(unbind, "cuMulticastUnbind", 12010);
    look_up(create_memory, "cuMemCreate");
    look_up(release, "cuMemRelease");
    look_up(share, "cuMemExportToShareableHandle");
    look_up(import, "cuMemImportFromShareableHandle");
    look_up(reserve, "cuMemAddressReserve");
    look_up(free, "cuMemAddressFree");
    look_up(map, "cuMemMap");
    look_up(unmap, "cuMemUnmap");
    look_up(allow_access, "cuMemSetAccess");
    look_up(fill, "cuMemsetD8", 3020);
    look_up(synchronize, "cuStreamSynchronize", 2000);
  }
};

// What a code mostly means here.
const char* hint(CUresult code) {
  switch (code) {
    case CUDA_ERROR_OUT_OF_MEMORY:
      return " (no memory, or all multicast objects of the NVSwitch are taken)";
    case CUDA_ERROR_ILLEGAL_STATE:
    case CUDA_ERROR_SYSTEM_NOT_READY:
      return " (is the fabric manager running?)";
    case CUDA_ERROR_NOT_PERMITTED:
      return " (fabric handles need the IMEX service)";
    default:
      return "";
  }
}

void check_call(CUresult code, const char* call) {
  check<BackendUnavailable>(code == CUDA_SUCCESS, call, " failed with CUDA error ",
                            static_cast<int>(code), hint(code));
}

CUmemAllocationHandleType handle_type(HandleKind kind) {
  return kind == HandleKind::kFabric ? CU_MEM_HANDLE_TYPE_FABRIC
                                     : CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
}

CUmemAllocationProp memory_of(int device, HandleKind kind) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
  properties.requestedHandleTypes = handle_type(kind);
  return properties;
}

CUmulticastObjectProp multicast_of(int n_devices, std::size_t bytes, HandleKind kind) {
  CUmulticastObjectProp properties{};
  properties.numDevices = static_cast<unsigned>(n_devices);
  properties.size = bytes;
  properties.handleTypes = handle_type(kind);
  return properties;
}

CUdeviceptr as_pointer(std::byte* address) { return reinterpret_cast<CUdeviceptr>(address); }

class CudaMulticastDriver final : public MulticastDriver {
 public:
  DeviceAbilities abilities(int device) override {
    const auto has = [&](CUdevice_attribute which) {
      int value = 0;
      check_call(driver_.attribute(&value, which, device), "cuDeviceGetAttribute");
      return value != 0;
    };
    DeviceAbilities found{has(CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED),
                          has(CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED),
                          has(CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED)};
    // The attribute alone is set on machines without the IMEX service too: tries one.
    found.shares_fabric = found.shares_fabric && can_share_fabric(device);
    return found;
  }
  std::size_t memory_granularity(int device, HandleKind kind) override {
    const CUmemAllocationProp properties = memory_of(device, kind);
    std::size_t bytes = 0;
    check_call(
        driver_.memory_granularity(&bytes, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
        "cuMemGetAllocationGranularity");
    return bytes;
  }
  std::size_t multicast_granularity(int n_devices, std::size_t bytes, HandleKind kind) override {
    const CUmulticastObjectProp properties = multicast_of(n_devices, bytes, kind);
    std::size_t granularity = 0;
    check_call(driver_.multicast_granularity(&granularity, &properties,
                                             CU_MULTICAST_GRANULARITY_RECOMMENDED),
               "cuMulticastGetGranularity");
    return granularity;
  }
  Handle create_multicast(int n_devices, std::size_t bytes, HandleKind kind) override {
    const CUmulticastObjectProp properties = multicast_of(n_devices, bytes, kind);
    CUmemGenericAllocationHandle handle = 0;
    check_call(driver_.create_multicast(&handle, &properties), "cuMulticastCreate");
    return handle;
  }
  void add_device(Handle multicast, int device) override {
    check_call(driver_.add_device(multicast, device), "cuMulticastAddDevice");
  }
  Handle create_memory(int device, std::size_t bytes, HandleKind kind) override {
    const CUmemAllocationProp properties = memory_of(device, kind);
    CUmemGenericAllocationHandle handle = 0;
    check_call(driver_.create_memory(&handle, bytes, &properties, 0), "cuMemCreate");
    return handle;
  }
  void bind(Handle multicast, Handle memory, std::size_t bytes) override {
    check_call(driver_.bind(multicast, 0, memory, 0, bytes, 0), "cuMulticastBindMem");
  }
  void unbind(Handle multicast, int device, std::size_t bytes) noexcept override {
    driver_.unbind(multicast, device, 0, bytes);
  }
  SharedHandle share(Handle handle, HandleKind kind) override {
    SharedHandle shared;
    shared.kind = kind;
    void* const to =
        kind == HandleKind::kFabric ? static_cast<void*>(shared.fabric.data()) : &shared.descriptor;
    check_call(driver_.share(to, handle, handle_type(kind), 0), "cuMemExportToShareableHandle");
    return shared;
  }
  Handle import(const SharedHandle& shared) override {
    SharedHandle copy = shared;
    void* const from = shared.kind == HandleKind::kFabric
                           ? static_cast<void*>(copy.fabric.data())
                           : reinterpret_cast<void*>(static_cast<std::intptr_t>(shared.descriptor));
    CUmemGenericAllocationHandle handle = 0;
    check_call(driver_.import(&handle, from, handle_type(shared.kind)),
               "cuMemImportFromShareableHandle");
    return handle;
  }
  void close(const SharedHandle& shared) noexcept override {
    if (shared.kind == HandleKind::kDescriptor && shared.descriptor >= 0)
      ::close(shared.descriptor);
  }
  void release(Handle handle) noexcept override { driver_.release(handle); }
  std::byte* reserve(std::size_t bytes, std::size_t alignment) override {
    CUdeviceptr address = 0;
    check_call(driver_.reserve(&address, bytes, alignment, 0, 0), "cuMemAddressReserve");
    return reinterpret_cast<std::byte*>(address);
  }
  void map(std::byte* address, std::size_t bytes, Handle handle) override {
    check_call(driver_.map(as_pointer(address), bytes, 0, handle, 0), "cuMemMap");
  }
  void allow_access(std::byte* address, std::size_t bytes, int device) override {
    const CUmemAccessDesc access{{CU_MEM_LOCATION_TYPE_DEVICE, device},
                                 CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    check_call(driver_.allow_access(as_pointer(address), bytes, &access, 1), "cuMemSetAccess");
  }
  void unmap(std::byte* address, std::size_t bytes) noexcept override {
    driver_.unmap(as_pointer(address), bytes);
  }
  void free(std::byte* address, std::size_t bytes) noexcept override {
    driver_.free(as_pointer(address), bytes);
  }
  // note: cuMemsetD8 does not wait for the GPU, nor do our streams for the one that it is in.
  void fill(std::byte* address, std::byte value, std::size_t bytes) override {
    check_call(driver_.fill(as_pointer(address), static_cast<unsigned char>(value), bytes),
               "cuMemsetD8");
    check_call(driver_.synchronize(nullptr), "cuStreamSynchronize");
  }

 private:
  bool can_share_fabric(int device) noexcept {
    try {
      const Handle handle = create_memory(device, memory_granularity(device, HandleKind::kFabric),
                                          HandleKind::kFabric);
      CUmemFabricHandle shared;
      const CUresult code = driver_.share(&shared, handle, CU_MEM_HANDLE_TYPE_FABRIC, 0);
      release(handle);
      return code == CUDA_SUCCESS;
    } catch (const std::exception&) {
      return false;
    }
  }

  Functions driver_;
};

}  // namespace

std::unique_ptr<MulticastDriver> create_multicast_driver() {
  return std::make_unique<CudaMulticastDriver>();
}

}  // namespace duplex::cuda
