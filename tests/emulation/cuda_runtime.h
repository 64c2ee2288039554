// What the kernels of csrc/cuda use of CUDA, for a C++ compiler: they then run on the CPU, thread by thread, for tests.
//
// Blocks run one after another, the threads of a block in turns that change at barriers (emulation.cpp). It is made to find
// mistakes: shared memory starts as NaN at every block, asynchronous copies happen as late as they may, a barrier that
// some threads never reach is an error, and the order of blocks and threads can be changed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>

#define PSPNET_FAST_EMULATED
#define PSPNET_FAST_CUDA_KEY CPU
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct uint4 {
  unsigned x, y, z, w;
};

// Set by the scheduler before a thread goes on.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((uint64_t{a} * b) >> 32);
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __frcp_rn(float a) {
  return 1 / a;
}
inline float rsqrtf(float a) {
  return 1 / std::sqrt(a);
}
template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}

namespace emulation {

// Runs the kernel once for each thread of the grid.
void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

void synchronise_block();
void synchronise_warp();

// All lanes of a warp show one another something: meet() returns what each shows, valid until all of them part().
const void* const* meet(const void* mine);
void part();
int lane();

}  // namespace emulation

inline void __syncthreads() {
  emulation::synchronise_block();
}
inline void __syncwarp(unsigned = 0xffffffffu) {
  emulation::synchronise_warp();
}

template <class T>
T __shfl_sync(unsigned, T value, int from) {
  const T theirs = *static_cast<const T*>(emulation::meet(&value)[from]);
  emulation::part();
  return theirs;
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  const void* const* const all = emulation::meet(&predicate);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    votes |= static_cast<unsigned>(*static_cast<const bool*>(all[lane])) << lane;
  }
  emulation::part();
  return votes;
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, emulation::lane() ^ distance);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, std::min(emulation::lane() + distance, 31));
}

// The host's side.
using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue = 1,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
};
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
#define CUDART_VERSION 13000

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDriverGetVersion(int* version);
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline const char* cudaGetErrorName(cudaError_t) {
  return "an error of the emulation";
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "no more is known";
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const unsigned threads = block.x * block.y * block.z;
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || threads < 1 ||
      threads > 1024) {
    return cudaErrorInvalidValue;
  }
  emulation::launch(grid, block, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}
