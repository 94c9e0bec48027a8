#include "backend/exchange.h"

#include "backend/backend.h"
#include "core/error.h"

namespace duplex {

void SlabExchange::add(Backend& backend, const ConvAddNormArgs& args, std::int64_t part_stride,
                       const PackedMatrix&) {
  check(args.n_parts >= 1 && args.n_parts * size() <= kMaxParts, "exchange: expected 1 to ",
        kMaxParts, " parts of all ranks, found ", args.n_parts, " of each of ", size());
  ConvAddNormArgs all = args;
  all.n_parts = 0;
  const auto n_floats = static_cast<std::size_t>(args.n_parts * part_stride);
  for (const void* slab : meet(n_floats * sizeof(float)))
    for (std::int32_t p = 0; p < args.n_parts; ++p)
      all.parts[all.n_parts++] = static_cast<const float*>(slab) + p * part_stride;
  backend.conv_add_norm(all);
}

void SlabExchange::gather(Backend& backend, const GatherArgs& args) {
  const auto n_floats = static_cast<std::size_t>(args.n_rows * args.stride);
  const std::span<const void* const> slabs = meet(n_floats * sizeof(float));
  if (args.out == nullptr) return;
  for (std::size_t rank = 0; rank < slabs.size(); ++rank) {
    const auto [first, n] = args.slices[rank];
    const auto* const from = static_cast<const float*>(slabs[rank]);
    for (std::int32_t i = 0; i < args.n_rows; ++i)
      backend.write(args.out + i * args.out_stride + first, from + i * args.stride,
                    static_cast<std::size_t>(n) * sizeof(float));
  }
}

}  // namespace duplex
