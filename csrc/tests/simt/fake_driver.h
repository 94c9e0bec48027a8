// A driver for the set-up of multicast memory, on the host's memory: it refuses what the CUDA
// driver refuses or would wait for without end, and knows what has not been given back.
#pragma once

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <barrier>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/error.h"
#include "device/multicast.h"

namespace duplex::simt_tests {

using cuda::DeviceAbilities;
using cuda::HandleKind;
using cuda::MulticastDriver;
using cuda::SharedHandle;

inline void rule(bool holds, const char* what) {
  if (!holds) throw std::logic_error(what);
}

// What the GPUs of a machine have in common. An object lives as long as a handle or mapping of it.
struct FakeFabric {
  static constexpr std::size_t kMemoryGranularity = 4096 * 4, kMulticastGranularity = 4096 * 16;

  struct Object {
    int descriptor;  // a memfd, also of a multicast object, to have a number of its own
    std::size_t bytes;
    int n_devices = 0;  // 0: memory
    int n_handles = 0;
    std::set<int> devices;
    std::map<int, MulticastDriver::Handle> bound = {};
  };
  std::mutex mutex;
  std::map<MulticastDriver::Handle, Object> objects;
  MulticastDriver::Handle next = 1;

  MulticastDriver::Handle make(std::size_t bytes, int n_devices) {
    const int descriptor = ::memfd_create("gpu", 0);
    rule(descriptor >= 0 && ::ftruncate(descriptor, static_cast<off_t>(bytes)) == 0, "memfd");
    objects[next] = {descriptor, bytes, n_devices, 1, {}};
    return next++;
  }
  void drop(MulticastDriver::Handle handle) {
    Object& object = objects.at(handle);
    if (--object.n_handles > 0) return;
    rule(object.bound.empty(), "a multicast object goes while memory is bound to it");
    for (const auto& [other, of] : objects)
      for (const auto& [device, memory] : of.bound)
        rule(memory != handle, "memory goes while it is bound");
    ::close(object.descriptor);
    objects.erase(handle);
  }
  static ino_t number(int descriptor) {
    struct stat of{};
    rule(::fstat(descriptor, &of) == 0, "no descriptor");
    return of.st_ino;
  }
};

// That of one rank. A call of it can be made to fail.
class FakeDriver final : public MulticastDriver {
 public:
  explicit FakeDriver(FakeFabric& fabric) : fabric_(fabric) {}

  DeviceAbilities has{true, true, false};
  int fails_at = -1;  // the call with this number fails
  int n_calls = 0;
  std::vector<std::string> calls;
  bool is_empty() const { return n_handles_ == 0 && ranges_.empty() && n_open_ == 0; }

  DeviceAbilities abilities(int) override {
    call("abilities");
    return has;
  }
  std::size_t memory_granularity(int, HandleKind) override {
    call("memory granularity");
    return FakeFabric::kMemoryGranularity;
  }
  std::size_t multicast_granularity(int, std::size_t, HandleKind) override {
    call("multicast granularity");
    return FakeFabric::kMulticastGranularity;
  }
  Handle create_multicast(int n_devices, std::size_t bytes, HandleKind kind) override {
    const auto lock = call("create multicast");
    check_kind(kind);
    rule(bytes > 0 && bytes % FakeFabric::kMulticastGranularity == 0, "multicast: granularity");
    rule(n_devices >= 2, "multicast: one device");
    ++n_handles_;
    return fabric_.make(bytes, n_devices);
  }
  void add_device(Handle multicast, int device) override {
    const auto lock = call("add device");
    FakeFabric::Object& object = fabric_.objects.at(multicast);
    rule(object.devices.insert(device).second, "a device is added twice");
    rule(static_cast<int>(object.devices.size()) <= object.n_devices, "too many devices");
  }
  Handle create_memory(int, std::size_t bytes, HandleKind kind) override {
    const auto lock = call("create memory");
    check_kind(kind);
    rule(bytes > 0 && bytes % FakeFabric::kMemoryGranularity == 0, "memory: granularity");
    ++n_handles_;
    return fabric_.make(bytes, 0);
  }
  void bind(Handle multicast, Handle memory, std::size_t bytes) override {
    const auto lock = call("bind");
    FakeFabric::Object& object = fabric_.objects.at(multicast);
    rule(is_complete(object), "bind waits until every device was added");
    rule(bytes % FakeFabric::kMulticastGranularity == 0 && bytes <= object.bytes, "bind: size");
    rule(fabric_.objects.at(memory).bytes >= bytes, "bind: memory");
    object.bound[own_device(object)] = memory;
  }
  void unbind(Handle multicast, int device, std::size_t) noexcept override {
    const std::scoped_lock lock(fabric_.mutex);
    note("unbind");
    fabric_.objects.at(multicast).bound.erase(device);
  }
  SharedHandle share(Handle handle, HandleKind kind) override {
    const auto lock = call("share");
    SharedHandle shared;
    shared.kind = kind;
    if (kind == HandleKind::kDescriptor) {
      shared.descriptor = ::dup(fabric_.objects.at(handle).descriptor);
      ++n_open_;
    } else {
      std::memcpy(shared.fabric.data(), &handle, sizeof handle);
    }
    return shared;
  }
  Handle import(const SharedHandle& shared) override {
    n_open_ += shared.kind == HandleKind::kDescriptor;  // it came from the other rank, open
    const auto lock = call("import");
    Handle handle = 0;
    if (shared.kind == HandleKind::kFabric) std::memcpy(&handle, shared.fabric.data(), 8);
    for (const auto& [candidate, object] : fabric_.objects)
      if (shared.kind == HandleKind::kDescriptor &&
          FakeFabric::number(object.descriptor) == FakeFabric::number(shared.descriptor))
        handle = candidate;
    ++fabric_.objects.at(handle).n_handles;
    ++n_handles_;
    return handle;
  }
  void close(const SharedHandle& shared) noexcept override {
    if (shared.descriptor < 0) return;
    --n_open_;
    ::close(shared.descriptor);
  }
  void release(Handle handle) noexcept override {
    const std::scoped_lock lock(fabric_.mutex);
    note("release");
    --n_handles_;
    fabric_.drop(handle);
  }
  std::byte* reserve(std::size_t bytes, std::size_t alignment) override {
    call("reserve");
    rule(bytes % alignment == 0, "reserve: alignment");
    void* const range = ::mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ranges_[static_cast<std::byte*>(range)] = {bytes, false};
    return static_cast<std::byte*>(range);
  }
  void map(std::byte* address, std::size_t bytes, Handle handle) override {
    const auto lock = call("map");
    const FakeFabric::Object& object = fabric_.objects.at(handle);
    rule(ranges_.at(address).bytes == bytes && !ranges_[address].is_mapped, "map: range");
    if (object.n_devices > 0)
      rule(object.bound.contains(own_device(object)), "a multicast object is mapped unbound");
    else
      ::mmap(address, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, object.descriptor, 0);
    ranges_[address] = {bytes, true, object.n_devices > 0};
  }
  void allow_access(std::byte* address, std::size_t bytes, int) override {
    call("allow access");
    rule(ranges_.at(address).is_mapped, "access: not mapped");
    if (!ranges_[address].is_multicast) ::mprotect(address, bytes, PROT_READ | PROT_WRITE);
  }
  void unmap(std::byte* address, std::size_t) noexcept override {
    note("unmap");
    rule(ranges_.at(address).is_mapped, "unmap: not mapped");
    ranges_[address].is_mapped = false;
  }
  void free(std::byte* address, std::size_t bytes) noexcept override {
    note("free");
    rule(!ranges_.at(address).is_mapped, "free: still mapped");
    ranges_.erase(address);
    ::munmap(address, bytes);
  }
  void fill(std::byte* address, std::byte value, std::size_t bytes) override {
    std::memset(address, static_cast<int>(value), bytes);
  }

  int number = 0;  // of the device

 private:
  struct Range {
    std::size_t bytes;
    bool is_mapped, is_multicast = false;
  };
  void note(const char* what) { calls.emplace_back(what); }
  std::unique_lock<std::mutex> call(const char* what) {
    note(what);
    check<Error>(n_calls++ != fails_at, what, " failed");
    return std::unique_lock(fabric_.mutex);
  }
  void check_kind(HandleKind kind) const {
    rule(kind == HandleKind::kFabric ? has.shares_fabric : has.shares_descriptors, "handle kind");
  }
  static bool is_complete(const FakeFabric::Object& object) {
    return static_cast<int>(object.devices.size()) == object.n_devices;
  }
  int own_device(const FakeFabric::Object& object) const {
    rule(object.devices.contains(number), "a device that was not added");
    return number;
  }

  FakeFabric& fabric_;
  std::map<std::byte*, Range> ranges_;
  int n_handles_ = 0, n_open_ = 0;
};

// Threads that meet.
struct Meetings {
  explicit Meetings(int n) : barrier(n), given(static_cast<std::size_t>(n)), descriptor(-1) {}
  std::barrier<> barrier;
  std::vector<std::string> given;
  int descriptor;
  std::atomic<int> failed{-1};
  int ends_at = -1;  // the meeting with this number: a rank is gone, as all others hear there
};

class ThreadRendezvous final : public Rendezvous {
 public:
  ThreadRendezvous(Meetings& meetings, int rank) : meetings_(meetings), rank_(rank) {}
  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(meetings_.given.size()); }
  std::vector<std::string> all_gather(const std::string& mine) override {
    come();
    meetings_.given[static_cast<std::size_t>(rank_)] = mine;
    meetings_.barrier.arrive_and_wait();
    const std::vector<std::string> all = meetings_.given;
    meetings_.barrier.arrive_and_wait();
    return all;
  }
  int share_descriptor(int from, int descriptor) override {
    come();
    if (rank_ == from) meetings_.descriptor = descriptor;
    meetings_.barrier.arrive_and_wait();
    const int copy = rank_ == from ? descriptor : ::dup(meetings_.descriptor);
    meetings_.barrier.arrive_and_wait();
    return copy;
  }
  void check_alive() const override {
    check<RankFailed>(meetings_.failed < 0, "rank ", meetings_.failed.load(), " has failed");
  }
  void fail(int rank, const std::string&) noexcept override { meetings_.failed = rank; }

 private:
  void come() { check<RankFailed>(n_meetings_++ != meetings_.ends_at, "a rank is gone"); }

  Meetings& meetings_;
  int rank_;
  int n_meetings_ = 0;
};

}  // namespace duplex::simt_tests
