// CUDA's return codes as exceptions.
#pragma once

#include <cuda_runtime.h>

#include "core/error.h"

namespace duplex::cuda {

template <class E = Error>
void check_cuda(cudaError_t code, const char* call) {
  if (code != cudaSuccess)
    fail<E>("cuda: ", call, " failed: ", cudaGetErrorName(code), " (", cudaGetErrorString(code),
            ")");
}

}  // namespace duplex::cuda
