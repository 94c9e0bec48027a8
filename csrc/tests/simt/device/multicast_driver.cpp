// The host's twin of csrc/backend/cuda/device/multicast_driver.cpp, for ranks that are processes:
// the memory of a GPU is a file of anonymous memory, a multicast object one that says which are
// bound to it. DUPLEX_SIMT_MULTICAST=0: GPUs without multicast.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string_view>

#include "core/error.h"
#include "device/multicast.h"
#include "tests/simt/system_memory.h"

namespace duplex::cuda {
namespace {

constexpr std::size_t kMemoryGranularity = 16384, kMulticastGranularity = 65536;
constexpr int kMostDevices = 64;

// What the file of a multicast object holds; its size tells it from memory.
struct Bindings {
  std::uint64_t file[kMostDevices];  // by device; 0: nothing
};
constexpr std::size_t kBindingsBytes = 4096;
static_assert(sizeof(Bindings) <= kBindingsBytes);

void check_call(bool holds, const char* call) {
  check<BackendUnavailable>(holds, call, " failed: ", std::strerror(errno));
}

struct stat status_of(int descriptor) {
  struct stat status{};
  check_call(::fstat(descriptor, &status) == 0, "fstat");
  return status;
}

class HostMulticastDriver final : public MulticastDriver {
 public:
  DeviceAbilities abilities(int) override {
    const char* const value = std::getenv("DUPLEX_SIMT_MULTICAST");
    return {value == nullptr || std::string_view(value) != "0", true, false};
  }
  std::size_t memory_granularity(int, HandleKind) override { return kMemoryGranularity; }
  std::size_t multicast_granularity(int, std::size_t, HandleKind) override {
    return kMulticastGranularity;
  }
  Handle create_multicast(int, std::size_t, HandleKind) override { return make(kBindingsBytes); }
  Handle create_memory(int, std::size_t bytes, HandleKind) override { return make(bytes); }
  void add_device(Handle, int device) override {
    check<BackendUnavailable>(device < kMostDevices, "multicast: expected a GPU below ",
                              kMostDevices, ", found ", device);
    device_ = device;
  }
  void bind(Handle multicast, Handle memory, std::size_t) override {
    bindings(multicast).file[device_] = status_of(descriptors_.at(memory)).st_ino;
  }
  void unbind(Handle multicast, int device, std::size_t) noexcept override {
    bindings(multicast).file[device] = 0;
  }
  SharedHandle share(Handle handle, HandleKind kind) override {
    SharedHandle shared;
    shared.kind = kind;
    shared.descriptor = ::fcntl(descriptors_.at(handle), F_DUPFD_CLOEXEC, 0);
    check_call(shared.descriptor >= 0, "dup");
    return shared;
  }
  Handle import(const SharedHandle& shared) override {
    const int descriptor = ::fcntl(shared.descriptor, F_DUPFD_CLOEXEC, 0);
    check_call(descriptor >= 0, "dup");
    return add(descriptor);
  }
  void close(const SharedHandle& shared) noexcept override {
    if (shared.descriptor >= 0) ::close(shared.descriptor);
  }
  void release(Handle handle) noexcept override {
    ::close(descriptors_.at(handle));
    descriptors_.erase(handle);
    const auto found = bindings_.find(handle);
    if (found == bindings_.end()) return;
    ::munmap(found->second, kBindingsBytes);
    bindings_.erase(found);
  }
  std::byte* reserve(std::size_t bytes, std::size_t) override {
    void* const range = ::mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check_call(range != MAP_FAILED, "mmap");
    return static_cast<std::byte*>(range);
  }
  // A multicast object is mapped when all memory is bound to it, and that of other ranks is mapped
  // here (multicast.h): what it stands for are those mappings.
  void map(std::byte* address, std::size_t bytes, Handle handle) override {
    const int descriptor = descriptors_.at(handle);
    const struct stat status = status_of(descriptor);
    if (status.st_size > static_cast<off_t>(kBindingsBytes)) {
      check_call(::mmap(address, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, descriptor,
                        0) != MAP_FAILED,
                 "mmap");
      mapped_[status.st_ino] = address;
      return;
    }
    std::vector<std::byte*> members;
    for (const std::uint64_t file : bindings(handle).file)
      if (file != 0) members.push_back(mapped_.at(file));
    objects_[address] = std::make_unique<simt::Multicast>(std::move(members), bytes, address);
  }
  void allow_access(std::byte*, std::size_t, int) override {}
  void unmap(std::byte* address, std::size_t bytes) noexcept override {
    if (objects_.erase(address) > 0) return;
    std::erase_if(mapped_, [&](const auto& entry) { return entry.second == address; });
    ::mmap(address, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  }
  void free(std::byte* address, std::size_t bytes) noexcept override { ::munmap(address, bytes); }
  void fill(std::byte* address, std::byte value, std::size_t bytes) override {
    std::uint32_t word = 0;
    std::memset(&word, static_cast<int>(value), sizeof word);
    for (std::size_t at = 0; at < bytes; at += sizeof word)
      simt::store_system(address + at, &word, 1);
  }

 private:
  Handle make(std::size_t bytes) {
    const int descriptor = ::memfd_create("duplex_gpu", MFD_CLOEXEC);
    check_call(descriptor >= 0, "memfd_create");
    check_call(::ftruncate(descriptor, static_cast<off_t>(bytes)) == 0, "ftruncate");
    return add(descriptor);
  }
  Handle add(int descriptor) {
    descriptors_[++last_] = descriptor;
    return last_;
  }
  Bindings& bindings(Handle multicast) {
    auto& mapped = bindings_[multicast];
    if (mapped == nullptr) {
      void* const range = ::mmap(nullptr, kBindingsBytes, PROT_READ | PROT_WRITE, MAP_SHARED,
                                 descriptors_.at(multicast), 0);
      check_call(range != MAP_FAILED, "mmap");
      mapped = static_cast<Bindings*>(range);
    }
    return *mapped;
  }

  int device_ = 0;
  Handle last_ = 0;
  std::map<Handle, int> descriptors_;
  std::map<Handle, Bindings*> bindings_;
  std::map<std::uint64_t, std::byte*> mapped_;  // memory, by its file
  std::map<std::byte*, std::unique_ptr<simt::Multicast>> objects_;
};

}  // namespace

std::unique_ptr<MulticastDriver> create_multicast_driver() {
  return std::make_unique<HostMulticastDriver>();
}

}  // namespace duplex::cuda
