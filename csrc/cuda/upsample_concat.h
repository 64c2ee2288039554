// upsample_concat in CUDA: what its kernels share. No torch.
#pragma once

#include "cuda/taps.h"

namespace pspnet_fast::cuda {

constexpr int kConcatThreads = 128;
constexpr int kConcatWarps = kConcatThreads / kWarp;
constexpr int kConcatLevels = 8;  // of one launch; more of them take more launches

struct ConcatLevel {
  int bins, first_cell, first_channel;
  int first_column;  // where the columns of all levels' cells stand in one row
};

struct Concat {
  int images, reduced, total_channels, height, width, cells, columns;
  bool align_corners;
  int level_count;
  ConcatLevel levels[kConcatLevels];
};

// A vector as it lies in memory, for what waits in registers: of 16-bit elements the compiler would make packing and
// unpacking, and stores of two bytes.
template <class T, int kLength>
using Raw = std::conditional_t<kLength * sizeof(T) == kAccessBytes, uint4, Vector<T, kLength>>;

template <class T, int kLength>
__device__ __forceinline__ Raw<T, kLength> load_raw(const T* from) {
  return *reinterpret_cast<const Raw<T, kLength>*>(from);
}

template <class T, int kLength>
__device__ __forceinline__ void store_raw(T* to, const Raw<T, kLength>& value) {
  *reinterpret_cast<Raw<T, kLength>*>(to) = value;
}

}  // namespace pspnet_fast::cuda
