// pyramid_pool on the CPU: what pyramid_pool.cpp prepares for the kernels of pyramid_pool_kernels.h.
#pragma once

#include "cpu/kernel.h"

namespace pspnet_fast {

// The starts and ends of all windows of all levels cut an axis into segments; every window is a run of whole segments.
struct PoolAxis {
  const int64_t* edges;  // from 0 to the axis' size: segment i is [edges[i], edges[i + 1])
  int64_t segments;
};

// A cell of the packed pyramid. Its window: segments [top, bottom) x [left, right), so many pixels.
struct PoolCell {
  int64_t top, bottom, left, right, pixels;
};

// channels_last: channels summed at once, so that the sums of a row of segments stay in L1.
constexpr int64_t kPoolChunk = 1024;

struct PyramidPool {
  Dtype dtype;
  bool channels_last;
  int64_t channels, height, width;
  int64_t pitch;  // the width, rounded up to whole vectors
  PoolAxis rows, columns;
  const PoolCell* cells;
  int64_t cell_count;
};

struct PyramidPoolForward : PyramidPool {
  const void* x;
  void* out;
  void* copy;             // where x's first image goes, or null
  int64_t copy_channels;  // of the tensor that the copy is a part of
};

struct PyramidPoolBackward : PyramidPool {
  const void* grad;
  const void* grad_input;                      // or null
  int64_t grad_input_image, grad_input_pixel;  // strides; the latter in channels_last only
  void* out;
};

// Units [begin, end) are blocks of channels, image after image; channels_last backward: rows of pixels.
// `scratch` has the accumulator's type.
PSPNET_FAST_DECLARE_KERNEL(pyramid_pool_forward, const PyramidPoolForward&, int64_t begin, int64_t end, void* scratch)
PSPNET_FAST_DECLARE_KERNEL(pyramid_pool_backward, const PyramidPoolBackward&, int64_t begin, int64_t end, void* scratch)

}  // namespace pspnet_fast
