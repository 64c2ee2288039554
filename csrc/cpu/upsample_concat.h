// upsample_concat on the CPU: what upsample_concat.cpp prepares for the kernels of upsample_concat_kernels.h.
#pragma once

#include "cpu/kernel.h"
#include "cpu/taps.h"

namespace pspnet_fast {

struct UpsampleLevel {
  int64_t bins;           // cells along an axis
  int64_t first_cell;     // in the packed pyramid
  int64_t first_channel;  // in the concatenation
  TapAxis rows, columns;
};

struct UpsampleConcat {
  Dtype dtype;
  bool channels_last;
  int64_t reduced, total_channels, height, width;
  const UpsampleLevel* levels;
  int64_t level_count, cell_count;
  int64_t pitch;  // the width, rounded up to whole vectors
};

struct UpsampleConcatForward : UpsampleConcat {
  const void* x;
  int64_t x_channels, x_first_channel;  // none: 0
  const void* pyramid;
  void* out;
};

struct UpsampleConcatBackward : UpsampleConcat {
  const void* grad;
  void* out;
};

// Units [begin, end) are blocks of channels, level after level, image after image; channels_last forward: pixels.
// `scratch` has the accumulator's type.
PSPNET_FAST_DECLARE_KERNEL(upsample_concat_forward, const UpsampleConcatForward&, int64_t begin, int64_t end,
                           void* scratch)
PSPNET_FAST_DECLARE_KERNEL(upsample_concat_backward, const UpsampleConcatBackward&, int64_t begin, int64_t end,
                           void* scratch)

}  // namespace pspnet_fast
