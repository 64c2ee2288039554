// pyramid_norm on the CPU: what pyramid_norm.cpp prepares for the kernels of pyramid_norm_kernels.h.
#pragma once

#include "cpu/kernel.h"

namespace pspnet_fast {

constexpr int64_t kNormBlock = 32;  // channels that one unit of work owns in a reduction

// Per channel values are accumulators, (levels, channels). Each kernel reads the fields that it needs.
struct PyramidNorm {
  Dtype dtype;
  int64_t images, channels;
  const int64_t* bins;
  int64_t level_count, cells;  // of all levels together, in one image
  bool relu;
  const void* grad;
  const void* y;
  const void* out;
  const void* mean;
  const void* invstd;
  const void* weight;
  const void* bias;
  const void* mean_grad;         // or null, with mean_grad_normal
  const void* mean_grad_normal;  // or null
  void* result;
  void* second_result;
};

// Units of work [begin, end) are blocks of channels for statistics and sums, cells for forward and backward.
PSPNET_FAST_DECLARE_KERNEL(pyramid_norm_statistics, const PyramidNorm& a, int64_t begin, int64_t end)
PSPNET_FAST_DECLARE_KERNEL(pyramid_norm_forward, const PyramidNorm& a, int64_t begin, int64_t end)
PSPNET_FAST_DECLARE_KERNEL(pyramid_norm_sums, const PyramidNorm& a, int64_t begin, int64_t end)
PSPNET_FAST_DECLARE_KERNEL(pyramid_norm_backward, const PyramidNorm& a, int64_t begin, int64_t end)

}  // namespace pspnet_fast
