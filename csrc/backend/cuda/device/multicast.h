// Memory of the same size on every GPU of a group, which all of them can write: each rank's at an
// address of its own, and, where the machine has multicast (NVLS), that of all ranks at one more.
//
// A set-up is a meeting: every rank makes one at the same time, and it ends alike for all of them.
// All buffers and signals of a group belong in one such memory, since a fabric has few multicast
// objects. What is asked of the driver goes through MulticastDriver, so that a test can check it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/exchange.h"

namespace duplex::cuda {

// How a piece of memory is named for other processes: a file descriptor, on one machine, or 64
// bytes, in one NVLink domain, where the IMEX service runs.
enum class HandleKind : std::uint8_t { kDescriptor, kFabric };
struct SharedHandle {
  HandleKind kind = HandleKind::kDescriptor;
  int descriptor = -1;
  std::array<std::byte, 64> fabric{};
};

struct DeviceAbilities {
  bool has_multicast = false;
  bool shares_descriptors = false;
  bool shares_fabric = false;
};

// The driver's calls, as it means them. What fails throws Error with the call and the code; what
// takes back does not fail.
class MulticastDriver {
 public:
  using Handle = std::uint64_t;

  virtual ~MulticastDriver() = default;
  virtual DeviceAbilities abilities(int device) = 0;
  virtual std::size_t memory_granularity(int device, HandleKind kind) = 0;
  virtual std::size_t multicast_granularity(int n_devices, std::size_t bytes, HandleKind kind) = 0;
  virtual Handle create_multicast(int n_devices, std::size_t bytes, HandleKind kind) = 0;
  virtual void add_device(Handle multicast, int device) = 0;
  virtual Handle create_memory(int device, std::size_t bytes, HandleKind kind) = 0;
  virtual void bind(Handle multicast, Handle memory, std::size_t bytes) = 0;
  virtual void unbind(Handle multicast, int device, std::size_t bytes) noexcept = 0;
  virtual SharedHandle share(Handle handle, HandleKind kind) = 0;
  virtual Handle import(const SharedHandle& shared) = 0;
  virtual void close(const SharedHandle& shared) noexcept = 0;
  virtual void release(Handle handle) noexcept = 0;
  virtual std::byte* reserve(std::size_t bytes, std::size_t alignment) = 0;
  virtual void map(std::byte* address, std::size_t bytes, Handle handle) = 0;
  virtual void allow_access(std::byte* address, std::size_t bytes, int device) = 0;
  virtual void unmap(std::byte* address, std::size_t bytes) noexcept = 0;
  virtual void free(std::byte* address, std::size_t bytes) noexcept = 0;
  virtual void fill(std::byte* address, std::byte value, std::size_t bytes) = 0;
};
// The CUDA driver's; throws BackendUnavailable where a function is missing.
std::unique_ptr<MulticastDriver> create_multicast_driver();

struct SharedMemoryOptions {
  int device = 0;
  std::size_t bytes = 0;
  bool wants_multicast = true;
};

class MulticastMemory {
 public:
  // Throws BackendUnavailable, on every rank, where GPUs cannot reach each other: which, and why.
  MulticastMemory(MulticastDriver& driver, Rendezvous& ranks, const SharedMemoryOptions& options);
  // No kernel of any rank may use the memory any more.
  ~MulticastMemory();
  MulticastMemory(const MulticastMemory&) = delete;
  MulticastMemory& operator=(const MulticastMemory&) = delete;

  std::size_t bytes() const { return bytes_; }  // at least what was asked for
  std::byte* own() const;
  std::byte* peer(int rank) const { return peers_[static_cast<std::size_t>(rank)].address; }
  std::byte* multicast() const { return multicast_.address; }  // null: see why_not()
  const std::string& why_not() const { return why_not_; }
  // Of this rank's own memory. All ranks meet before the first kernel: meet().
  void fill(std::size_t at, std::byte value, std::size_t bytes);
  void meet();

 private:
  // A handle and where it is mapped; what is null is not there.
  struct Mapping {
    MulticastDriver::Handle handle = 0;
    std::byte* address = nullptr;
    bool is_mapped = false;
  };
  void choose_kind();
  void make_own();
  void check_sizes();
  void make_multicast();
  void reach_peers();
  void map(Mapping& mapping, std::size_t alignment);
  void undo(Mapping& mapping) noexcept;
  void undo_multicast() noexcept;
  MulticastDriver::Handle import_of(int from, MulticastDriver::Handle own);
  // Runs a step; on every rank alike, says what went wrong on any.
  template <class Step>
  std::string together(const Step& step);

  MulticastDriver& driver_;
  Rendezvous& ranks_;
  SharedMemoryOptions options_;
  HandleKind kind_ = HandleKind::kDescriptor;
  std::size_t granularity_ = 0, bytes_ = 0;
  std::vector<Mapping> peers_;  // by rank, the own among them
  Mapping multicast_;
  bool is_bound_ = false;
  std::string why_not_;
};

}  // namespace duplex::cuda
