// Kernels with one mistake each, for tests/test_emulation.py: does the emulation show it?

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "cuda/device.h"

namespace {

using namespace pspnet_fast::cuda;
using torch::stable::Tensor;

constexpr int kThreads = 64;

enum class Mistake { none, no_wait, no_barrier, lonely_barrier, never_waits, misaligned, bulk_no_wait };

// y = x reversed, 64 numbers, through shared memory.
__global__ void reverse_kernel(const float* x, float* y, Mistake mistake) {
  float* const tile = shared_memory<float>();
  Barrier* const barrier = reinterpret_cast<Barrier*>(tile + kThreads);
  const int t = static_cast<int>(threadIdx.x);
  if (mistake == Mistake::bulk_no_wait) {
    if (t == 0) {
      barrier_init(barrier);
      barrier_expect(barrier, kThreads * sizeof(float));
      bulk_load(tile, x, kThreads * sizeof(float), barrier);
    }
  } else if (mistake == Mistake::no_barrier) {
    tile[t] = x[t];
  } else if (t % 4 == 0) {
    copy_async(tile + t, x + t + (mistake == Mistake::misaligned));
    if (mistake != Mistake::never_waits) {
      copy_async_commit();
    }
    if (mistake != Mistake::no_wait) {
      copy_async_wait<0>();
    }
  }
  if (mistake == Mistake::lonely_barrier && t == 5) {
    __syncwarp();
  }
  if (mistake != Mistake::no_barrier) {
    __syncthreads();
  }
  y[t] = tile[kThreads - 1 - t];
  if (mistake == Mistake::no_wait) {
    __syncthreads();
    copy_async_wait<0>();
  }
}

Tensor reverse(const Tensor& x, int64_t mistake) {
  Tensor y = torch::stable::empty_like(x);
  const auto* const from = static_cast<const float*>(x.const_data_ptr());
  auto* const to = static_cast<float*>(y.mutable_data_ptr());
  emulation::launch(dim3(1), dim3(kThreads), kThreads * sizeof(float) + sizeof(Barrier),
                    [=] { reverse_kernel(from, to, static_cast<Mistake>(mistake)); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pspnet_fast_emulated, m) {
  m.def("reverse(Tensor x, int mistake) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pspnet_fast_emulated, CPU, m) {
  m.impl("reverse", TORCH_BOX(&reverse));
}
