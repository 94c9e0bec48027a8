// What this library exports to csrc/backend/loaded/loader.cpp.
#include "host/cuda_backend.h"

extern "C" __attribute__((visibility("default"))) duplex::Backend* duplex_create_backend(
    const duplex::BackendOptions& options) {
  return new duplex::cuda::CudaBackend(options);
}
