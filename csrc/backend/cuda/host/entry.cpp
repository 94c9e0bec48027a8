// What this library exports to csrc/backend/loaded/loader.cpp.
#include "core/error.h"
#include "core/owner_process.h"
#include "host/cuda_backend.h"

namespace {

// CUDA cannot be used in a fork of a process that has used it, whatever was closed there.
void check_process() {
  static const duplex::OwnerProcess first;
  duplex::check<duplex::BackendUnavailable>(
      first.is_here(),
      "backend 'cuda': expected a process of its own, found a fork of one that "
      "has used CUDA, which CUDA does not work in; start it anew (multiprocessing: "
      "\"spawn\") or load no engine with device=\"cuda\" before the fork");
}

}  // namespace

extern "C" __attribute__((visibility("default"))) duplex::Backend* duplex_create_backend(
    const duplex::BackendOptions& options) {
  check_process();
  return new duplex::cuda::CudaBackend(options);
}
