// A turn (TurnArgs of backend/op_args.h) on the device: what lies where while it is in progress.
#pragma once

#include <vector>

#include "host/cuda_backend.h"
#include "kernels/launchers.h"

namespace duplex::cuda {

struct CudaBackend::Turn {
  const TurnArgs& args;
  const TurnSteps& steps;
  // Of the passes behind the first, where each sequence is at its end: launches are cut for that.
  std::vector<Segment> later;

  // ---- on the device
  Segment* first_segments = nullptr;
  TurnPlaces places{};
  EmbedTextArgs text{}, tokens{};  // of the first pass, of later ones
  EmbedAudioArgs audio{};
  std::int32_t* last_rows = nullptr;   // of each sequence in the first pass
  std::int32_t* later_rows = nullptr;  // and in later ones
  std::byte* head_rows = nullptr;      // (count, passed.stride)

  std::int32_t count() const { return args.segments.count; }
  std::int64_t row_bytes() const {
    return args.passed.stride * static_cast<std::int64_t>(dtype_bytes(args.passed.dtype));
  }
  Segments later_segments() const { return {later.data(), count(), count()}; }
  Segments on_device(const Segments& of) const {
    return {of.data == later.data() ? places.segments : first_segments, of.count, of.n_rows};
  }
};

}  // namespace duplex::cuda
