// upsample_argmax on the CPU: what upsample_argmax.cpp prepares for the kernels of upsample_argmax_kernels.h.
#pragma once

#include "cpu/kernel.h"
#include "cpu/taps.h"

namespace pspnet_fast {

struct UpsampleArgmax {
  Dtype dtype;
  bool channels_last;
  int64_t classes, rows, columns;  // of the logits
  int64_t height, width;           // of the labels
  int64_t pitch;                   // classes, rounded up to whole vectors
  TapAxis row_taps, column_taps;
  const void* logits;
  void* labels;
  int64_t label_bytes;  // 1, 4 or 8
  float* confidence;    // or null
};

// What a thread needs to work in, in elements of the accumulator's type: 2 rows of nodes and their flags, the columns'
// fractions, and for every class its largest node, its number, 4 nodes, and a start and a step for each of 4 rows.
constexpr int64_t kArgmaxRows = 4;
constexpr int64_t argmax_scratch(const UpsampleArgmax& a) {
  return 2 * a.columns * (a.pitch + 1) + a.width + kChannelBlock + (6 + 2 * kArgmaxRows) * a.pitch;
}

// Units [begin, end) are rows of labels, image after image. `scratch` has the accumulator's type.
PSPNET_FAST_DECLARE_KERNEL(upsample_argmax_forward, const UpsampleArgmax&, int64_t begin, int64_t end, void* scratch)

}  // namespace pspnet_fast
