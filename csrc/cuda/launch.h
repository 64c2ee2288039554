// From a tensor to a launch: the device and its stream, what the card can do, errors in words.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#if !defined(PSPNET_FAST_EMULATED)
#include <torch/csrc/stable/accelerator.h>
#endif

#include <climits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include "checks.h"
#include "cuda/device.h"

namespace pspnet_fast::cuda {

// Throws what a failed CUDA call means, and what to do about it.
void check_cuda(cudaError_t error, const char* op);

// What a launcher asks of a card.
struct Device {
  int capability;       // 80 for 8.0, 90 for 9.0
  int multiprocessors;
  int shared_bytes;     // that one block may have
  bool bulk_copies() const { return capability >= 90; }
};

// Makes a tensor's device the current one for the time of a call, and launches on its current stream.
class Launcher {
 public:
  Launcher(const char* op, const Tensor& tensor);

  const Device& device() const { return device_; }

  // kernel<<<grid, threads, shared_bytes>>>(arguments...), checked. More than 48 KiB of shared memory is asked for.
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                  Arguments&&... arguments) const {
    constexpr size_t kWithoutAsking = 48 * 1024;
    if (shared_bytes > kWithoutAsking) {
      check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shared_bytes)),
                 op_);
    }
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream_;
    check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), op_);
  }

 private:
  const char* op_;
#if !defined(PSPNET_FAST_EMULATED)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_;
  Device device_;
};

// An uninitialised tensor on x's device; of x's dtype unless another is given.
Tensor new_tensor(const Tensor& x, const std::vector<int64_t>& size, std::optional<ScalarType> dtype = std::nullopt,
                  bool channels_last = false);

// Float64 is left to the reference.
void check_cuda_dtype(const char* op, const char* name, const Tensor& tensor);

// Calls body(T{}) with the element type T of a dtype that check_cuda_dtype let through.
template <class Body>
void dispatch_dtype(ScalarType dtype, Body body) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return body(bfloat16{});
    case ScalarType::Half:
      return body(float16{});
    default:
      return body(float{});
  }
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline bool is_aligned(const void* pointer, int64_t bytes = kAccessBytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

// For kernels that count in 32 bits.
inline int narrow(const char* op, const char* what, int64_t value) {
  check(value <= INT_MAX, op, what, " must be below 2^31 for the cuda backend, got ", value);
  return static_cast<int>(value);
}

inline dim3 grid_of(const char* op, int64_t blocks) {
  return dim3(static_cast<unsigned>(narrow(op, "the number of blocks", blocks)));
}

constexpr int64_t divide_up(int64_t length, int64_t block) {
  return (length + block - 1) / block;
}

}  // namespace pspnet_fast::cuda
