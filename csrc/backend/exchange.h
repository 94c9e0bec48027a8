// How the ranks of a tensor-parallel group meet: each fills a slab, then all add, or put together,
// what the slabs of all hold.
//
// All ranks of a group make the same calls in the same order. Ranks on the CPU meet in slabs that
// each can read (SlabExchange); ranks on GPUs have an exchange of their backend's, in the GPUs'
// memory or by way of such slabs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "backend/op_args.h"
#include "core/shard.h"

namespace duplex {

class Backend;

// Rows of which each rank has a slice in its slab, as (n_rows, stride).
struct GatherArgs {
  std::int32_t n_rows;
  std::int64_t stride;  // floats, a multiple of 4, the same on every rank
  const Slice* slices;  // by rank: the columns of `out` that it has, from its first on
  float* out;           // (n_rows, out_stride); null: not wanted on this rank
  std::int64_t out_stride;
};

class Exchange {
 public:
  virtual ~Exchange() = default;
  Exchange() = default;
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual std::size_t slab_bytes() const = 0;
  // The slab that this rank fills before it meets the others next; the backend's memory.
  virtual void* mine() = 0;
  // conv_add_norm of the sum of all parts of all ranks, rank 0's first. args.n_parts is that of
  // each rank, `part_stride` floats from one to the next in its slab; args.parts is not read.
  // `next`: the matrix that is read next, which may be asked for while this rank waits; none if
  // its data are null. `backend`: that of the lane. Both throw RankFailed when a rank is gone or
  // does not come in time.
  virtual void add(Backend& backend, const ConvAddNormArgs& args, std::int64_t part_stride,
                   const PackedMatrix& next) = 0;
  virtual void gather(Backend& backend, const GatherArgs& args) = 0;
  // Whether spread_rows makes rank 0's rows those of every rank; where not, the hosts carry them.
  virtual bool spreads_rows() const { return false; }
  virtual void spread_rows(float*, std::int64_t /*n_floats*/) {}  // a multiple of 4
};

// Slabs that every rank reads as memory of its own backend.
class SlabExchange : public Exchange {
 public:
  // Waits until every rank has filled its slab, the first `bytes` of it, as many on all ranks; the
  // slabs by rank, good until this rank's next meet(). Throws RankFailed when a rank is gone or
  // does not come in time.
  virtual std::span<const void* const> meet(std::size_t bytes) = 0;

  void add(Backend& backend, const ConvAddNormArgs& args, std::int64_t part_stride,
           const PackedMatrix& next) override;
  void gather(Backend& backend, const GatherArgs& args) override;
};

// How the hosts of a group meet while their devices are connected. All calls but size() and rank()
// throw RankFailed if a rank is gone.
class Rendezvous {
 public:
  virtual ~Rendezvous() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // What every rank gave, by rank.
  virtual std::vector<std::string> all_gather(const std::string& mine) = 0;
  // The descriptor of rank `from`, as this process can use it; the caller closes it.
  virtual int share_descriptor(int from, int descriptor) = 0;
  // Any thread, also long after the meeting.
  virtual void check_alive() const = 0;
  // Says that a rank is gone: the group is over. Any thread.
  virtual void fail(int rank, const std::string& reason) noexcept = 0;
};

// The most that is done in one call of an exchange, and what connects the devices.
struct ExchangeOptions {
  // "nvls", "p2p", "auto": the best of these that is there; "shared memory": of the hosts.
  std::string transport;
  bool adds_in_switch = false;   // not in rank order; needs "nvls"
  std::int32_t max_rows;         // of add
  std::int32_t width;            // of a row of add
  std::int32_t n_parts = 1;      // of add, on each rank
  std::int64_t part_stride = 0;  // of add, from a part to the next for max_rows
  std::int64_t gather_stride;    // of gather
  std::int64_t row_stride = 0;   // of spread_rows, for max_rows
  std::size_t slab_bytes;
};

}  // namespace duplex
