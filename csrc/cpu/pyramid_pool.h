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

constexpr int64_t kPoolBlock = 16;    // channels that one unit of work owns, whatever the width of the vectors
constexpr int64_t kPoolChunk = 1024;  // channels_last: channels summed at once, a row of segments' sums stays in L1
constexpr int64_t kPoolBuffer = 8192;  // NCHW: elements of one block's rows held at once, in L1

struct PyramidPool {
  Dtype dtype;
  bool channels_last;
  int64_t channels, height, width;
  PoolAxis rows, columns;
  const PoolCell* cells;
  int64_t cell_count;

  int64_t blocks() const { return (channels + kPoolBlock - 1) / kPoolBlock; }
  int64_t padded_width() const { return (width + kPoolBlock - 1) / kPoolBlock * kPoolBlock; }
  // NCHW: row segments whose rows are buffered together, so that planes are walked from end to end.
  int64_t buffered_rows() const {
    const int64_t fit = kPoolBuffer / (kPoolBlock * padded_width());
    return fit < 1 ? 1 : fit < rows.segments ? fit : rows.segments;
  }
};

struct PyramidPoolForward : PyramidPool {
  const void* x;
  void* out;
};

struct PyramidPoolBackward : PyramidPool {
  const void* grad;
  const void* grad_input;  // or null
  int64_t grad_input_image, grad_input_pixel;  // strides; the latter in channels_last only
  void* out;
};

// Units of work [begin, end) are blocks of channels, image after image; channels_last backward: rows of pixels.
// `scratch` has the accumulator's type.
PSPNET_FAST_DECLARE_KERNEL(pyramid_pool_forward, const PyramidPoolForward& a, int64_t begin, int64_t end, void* scratch)
PSPNET_FAST_DECLARE_KERNEL(pyramid_pool_backward, const PyramidPoolBackward& a, int64_t begin, int64_t end, void* scratch)

}  // namespace pspnet_fast
