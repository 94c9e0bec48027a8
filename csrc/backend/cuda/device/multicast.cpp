#include "device/multicast.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"

namespace duplex::cuda {
namespace {

std::size_t round_up_to(std::size_t bytes, std::size_t granularity) {
  return (bytes + granularity - 1) / granularity * granularity;
}

// What every rank has, or what the first without it is called.
std::string first_without(const std::vector<std::string>& abilities, std::size_t which) {
  for (std::size_t rank = 0; rank < abilities.size(); ++rank)
    if (abilities[rank].size() <= which || abilities[rank][which] != 'y')
      return "rank " + std::to_string(rank);
  return "";
}

}  // namespace

MulticastMemory::MulticastMemory(MulticastDriver& driver, Rendezvous& ranks,
                                 const SharedMemoryOptions& options)
    : driver_(driver),
      ranks_(ranks),
      options_(options),
      peers_(static_cast<std::size_t>(ranks.size())) {
  check(options.bytes > 0, "group memory: expected 1 byte or more, found 0");
  try {
    choose_kind();
    std::string problem = together([&] { make_own(); });
    if (problem.empty()) problem = together([&] { check_sizes(); });
    if (problem.empty()) problem = together([&] { reach_peers(); });
    check<BackendUnavailable>(problem.empty(),
                              "group memory: the GPUs cannot share memory: ", problem,
                              "; transport=\"shared memory\" goes by way of their hosts");
    if (!why_not_.empty()) return;
    make_multicast();
  } catch (...) {
    undo_multicast();
    for (Mapping& peer : peers_) undo(peer);
    throw;
  }
}

// note: the multicast object goes first, while the memory that is bound to it is still there.
MulticastMemory::~MulticastMemory() {
  undo_multicast();
  for (Mapping& peer : peers_) undo(peer);
}

std::byte* MulticastMemory::own() const { return peer(ranks_.rank()); }

void MulticastMemory::fill(std::size_t at, std::byte value, std::size_t bytes) {
  check(at <= bytes_ && bytes <= bytes_ - at, "group memory: expected a range inside ", bytes_,
        " bytes, found ", bytes, " at ", at);
  driver_.fill(own() + at, value, bytes);
}

void MulticastMemory::meet() { ranks_.all_gather(""); }

template <class Step>
std::string MulticastMemory::together(const Step& step) {
  std::string mine;
  try {
    step();
  } catch (const RankFailed&) {
    throw;  // no meeting will come about
  } catch (const std::exception& error) {
    mine = error.what();
  }
  const std::vector<std::string> all = ranks_.all_gather(mine);
  for (std::size_t rank = 0; rank < all.size(); ++rank)
    if (!all[rank].empty()) return "rank " + std::to_string(rank) + ": " + all[rank];
  return "";
}

// What all ranks can do: descriptors before fabric handles, which only several machines need.
void MulticastMemory::choose_kind() {
  DeviceAbilities mine;
  const std::string problem = together([&] { mine = driver_.abilities(options_.device); });
  check<BackendUnavailable>(problem.empty(), "group memory: ", problem);
  const auto letter = [](bool has) { return has ? 'y' : 'n'; };
  const std::vector<std::string> all =
      ranks_.all_gather({letter(mine.has_multicast), letter(mine.shares_descriptors),
                         letter(mine.shares_fabric), letter(options_.wants_multicast)});
  const std::string no_descriptors = first_without(all, 1), no_fabric = first_without(all, 2);
  check<BackendUnavailable>(no_descriptors.empty() || no_fabric.empty(),
                            "group memory: expected GPUs that share memory by file descriptors or "
                            "by fabric handles, found neither on ",
                            no_descriptors, " and on ", no_fabric,
                            "; fabric handles need the IMEX service");
  kind_ = no_descriptors.empty() ? HandleKind::kDescriptor : HandleKind::kFabric;
  if (ranks_.size() < 2)
    why_not_ = "one rank has nobody to send to";
  else if (!first_without(all, 3).empty())
    why_not_ = "not wanted by " + first_without(all, 3);
  else if (!first_without(all, 0).empty())
    why_not_ = "the GPU of " + first_without(all, 0) +
               " has no multicast (NVSwitch of the third generation or newer, fabric manager)";
}

void MulticastMemory::make_own() {
  granularity_ = driver_.memory_granularity(options_.device, kind_);
  if (why_not_.empty())
    granularity_ = std::max(granularity_,
                            driver_.multicast_granularity(
                                ranks_.size(), round_up_to(options_.bytes, granularity_), kind_));
  bytes_ = round_up_to(options_.bytes, granularity_);
  Mapping& own = peers_[static_cast<std::size_t>(ranks_.rank())];
  own.handle = driver_.create_memory(options_.device, bytes_, kind_);
  map(own, granularity_);
}

void MulticastMemory::check_sizes() {
  const std::vector<std::string> all = ranks_.all_gather(std::to_string(bytes_));
  for (std::size_t rank = 0; rank < all.size(); ++rank)
    check<BackendUnavailable>(all[rank] == all[0], "expected as much memory everywhere, found ",
                              all[0], " bytes on rank 0 and ", all[rank], " on rank ", rank);
}

void MulticastMemory::map(Mapping& mapping, std::size_t alignment) {
  mapping.address = driver_.reserve(bytes_, alignment);
  driver_.map(mapping.address, bytes_, mapping.handle);
  mapping.is_mapped = true;
  driver_.allow_access(mapping.address, bytes_, options_.device);
}

void MulticastMemory::undo(Mapping& mapping) noexcept {
  if (mapping.is_mapped) driver_.unmap(mapping.address, bytes_);
  if (mapping.address != nullptr) driver_.free(mapping.address, bytes_);
  if (mapping.handle != 0) driver_.release(mapping.handle);
  mapping = {};
}

// The handle of rank `from`, of which that rank gives `own`; 0 on that rank. Everyone takes part,
// whatever has gone wrong here: so a rank that cannot share gives nothing, and says why later.
MulticastDriver::Handle MulticastMemory::import_of(int from, MulticastDriver::Handle own) {
  const bool is_mine = ranks_.rank() == from;
  SharedHandle shared;
  shared.kind = kind_;
  struct Close {  // also where a rank is gone in the meetings below
    MulticastDriver& driver;
    const SharedHandle& handle;
    ~Close() { driver.close(handle); }
  };
  const Close close{driver_, shared};
  std::string bytes, problem;
  try {
    if (is_mine) shared = driver_.share(own, kind_);
    if (is_mine && kind_ == HandleKind::kFabric)
      bytes.assign(reinterpret_cast<const char*>(shared.fabric.data()), shared.fabric.size());
  } catch (const std::exception& error) {
    problem = error.what();
  }
  if (kind_ == HandleKind::kFabric)
    bytes = ranks_.all_gather(bytes)[static_cast<std::size_t>(from)];
  const int descriptor = kind_ == HandleKind::kDescriptor && together([&] {
                                                               if (!problem.empty()) fail(problem);
                                                             }).empty()
                             ? ranks_.share_descriptor(from, shared.descriptor)
                             : -1;
  if (is_mine) {
    check<BackendUnavailable>(problem.empty(), problem);
    return 0;
  }
  if (kind_ == HandleKind::kFabric && bytes.size() == shared.fabric.size())
    std::memcpy(shared.fabric.data(), bytes.data(), bytes.size());
  shared.descriptor = descriptor;
  check<BackendUnavailable>(descriptor >= 0 || (kind_ == HandleKind::kFabric && !bytes.empty()),
                            "rank ", from, " shared nothing");
  return driver_.import(shared);
}

void MulticastMemory::reach_peers() {
  std::string problem;
  for (int from = 0; from < ranks_.size(); ++from) {
    Mapping& peer = peers_[static_cast<std::size_t>(from)];
    try {
      const MulticastDriver::Handle handle = import_of(from, peer.handle);
      if (from == ranks_.rank()) continue;
      peer.handle = handle;
      map(peer, granularity_);
    } catch (const RankFailed&) {
      throw;
    } catch (const std::exception& error) {
      if (problem.empty()) problem = error.what();  // others still wait for this rank's share
    }
  }
  check<BackendUnavailable>(problem.empty(), problem);
}

// Each step ends with a meeting: bind and map wait until every device was added. Whatever fails,
// fails for all, and then they go without.
void MulticastMemory::make_multicast() {
  const int rank = ranks_.rank();
  std::string problem = together([&] {
    if (rank == 0) multicast_.handle = driver_.create_multicast(ranks_.size(), bytes_, kind_);
  });
  const auto next = [&](const auto& step) {
    if (problem.empty()) problem = together(step);
  };
  next([&] {
    const MulticastDriver::Handle imported = import_of(0, multicast_.handle);
    if (rank != 0) multicast_.handle = imported;
  });
  next([&] { driver_.add_device(multicast_.handle, options_.device); });
  next([&] {
    driver_.bind(multicast_.handle, peers_[static_cast<std::size_t>(rank)].handle, bytes_);
    is_bound_ = true;
  });
  next([&] { map(multicast_, granularity_); });
  if (problem.empty()) return;
  undo_multicast();
  why_not_ = problem;
}

void MulticastMemory::undo_multicast() noexcept {
  if (multicast_.is_mapped) driver_.unmap(multicast_.address, bytes_);
  if (multicast_.address != nullptr) driver_.free(multicast_.address, bytes_);
  if (is_bound_) driver_.unbind(multicast_.handle, options_.device, bytes_);
  if (multicast_.handle != 0) driver_.release(multicast_.handle);
  multicast_ = {};
  is_bound_ = false;
}

}  // namespace duplex::cuda
