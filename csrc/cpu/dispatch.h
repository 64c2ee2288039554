// From a tensor to a kernel: which instruction set, which dtype, and memory to work in.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cpu/kernel.h"

namespace pspnet_fast {

// What the kernels are compiled for. The best that the machine supports, unless PSPNET_FAST_CPU_CAPABILITY
// (scalar, avx2 or avx512) says otherwise; read once.
enum class Capability { scalar, avx2, avx512 };

Capability cpu_capability();
const char* to_string(Capability capability);

// The version of a kernel that this machine runs: PSPNET_FAST_KERNEL(pyramid_pool_forward)(arguments, begin, end).
#if defined(__x86_64__)
#define PSPNET_FAST_KERNEL(name)                                \
  (cpu_capability() == Capability::avx512   ? &avx512::name     \
       : cpu_capability() == Capability::avx2 ? &avx2::name     \
                                              : &scalar::name)
#else
#define PSPNET_FAST_KERNEL(name) (&scalar::name)
#endif

Dtype dtype_of(const torch::stable::Tensor& tensor);

// An uninitialised tensor with x's dtype and device. A large one is memory fresh from the system: it is advised to come
// in huge pages, one fault for 2 MiB instead of 512, so write it where it is needed and do not touch it before.
torch::stable::Tensor new_output(const torch::stable::Tensor& x, const std::vector<int64_t>& size,
                                 bool channels_last = false);

// Uninitialised memory for one thread, aligned to a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  template <class A>
  A* as() const {
    return static_cast<A*>(data_.get());
  }

 private:
  std::unique_ptr<void, decltype(&std::free)> data_;
};

}  // namespace pspnet_fast
