// From a tensor to a kernel: which instruction set, which dtype, and memory to work in.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
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

// How many blocks of kChannelBlock cover a length.
constexpr int64_t whole_blocks(int64_t length) {
  return (length + kChannelBlock - 1) / kChannelBlock;
}

// Calls kernel(arguments, begin, end, scratch) on parts of [0, units): each thread has scratch of its own, so many
// elements of the accumulator's type. Parts are large enough to be worth a thread.
template <class Kernel, class Arguments>
void run_kernel(Kernel kernel, const Arguments& a, int64_t units, int64_t elements_per_unit, int64_t scratch_elements) {
  constexpr int64_t kElements = 32768;
  const int64_t element = a.dtype == Dtype::float64 ? sizeof(double) : sizeof(float);
  torch::stable::parallel_for(0, units, std::max<int64_t>(1, kElements / std::max<int64_t>(1, elements_per_unit)),
                              [&](int64_t begin, int64_t end) {
                                const Scratch scratch(scratch_elements * element);
                                kernel(a, begin, end, scratch.as<void>());
                              });
}

}  // namespace pspnet_fast
