// Stands where the CUDA backend would: same factory, and the advice to give.
#include "backend/backend.h"

#include "core/error.h"

namespace duplex {

std::unique_ptr<Backend> create_no_cuda_backend(const BackendOptions& options);

std::unique_ptr<Backend> create_no_cuda_backend(const BackendOptions&) {
  fail<BackendUnavailable>("backend 'cuda': this build has no CUDA backend; use device=\"cpu\"");
}

}  // namespace duplex
