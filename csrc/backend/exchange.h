// How the ranks of a tensor-parallel group meet: each fills a slab, then reads the slabs of all.
//
// All ranks of a group make the same calls in the same order. What the slabs mean is the model's
// business: partial sums, which every rank adds in ascending order, or pieces of the logits.
#pragma once

#include <cstddef>
#include <span>

namespace duplex {

class Exchange {
 public:
  virtual ~Exchange() = default;
  Exchange() = default;
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual std::size_t slab_bytes() const = 0;
  // The slab that this rank fills before it meets the others next.
  virtual void* mine() = 0;
  // Waits until every rank has filled its slab, the first `bytes` of it, as many on all ranks; the
  // slabs by rank, good until this rank's next meet(). Throws RankFailed when a rank is gone or
  // does not come in time.
  virtual std::span<const void* const> meet(std::size_t bytes) = 0;
};

}  // namespace duplex
