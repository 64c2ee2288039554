// upsample_softmax_add on the CPU: what upsample_softmax_add.cpp prepares for upsample_softmax_add_kernels.h.
#pragma once

#include "cpu/kernel.h"
#include "cpu/taps.h"

namespace pspnet_fast {

struct UpsampleSoftmaxAdd {
  Dtype dtype;
  bool channels_last, flip;
  int64_t windows, classes, rows, columns;  // of the logits
  int64_t height, width;                    // of a window
  int64_t total_height, total_width;
  int64_t pitch, column_pitch;  // the window's and the logits' width, rounded up to whole vectors, and one more
  TapAxis row_taps, column_taps;
  const int64_t* corners;  // (top, left) of every window
  double weight;
  const void* logits;
  float* total;
};

// A row of every class: of nodes, and of pixels; the fractions of the columns, and what each column is multiplied by.
constexpr int64_t softmax_scratch(const UpsampleSoftmaxAdd& a) {
  return a.classes * (a.column_pitch + a.pitch) + 2 * a.pitch;
}

// Units [begin, end) are rows of the total. `scratch` has the accumulator's type.
PSPNET_FAST_DECLARE_KERNEL(upsample_softmax_add_forward, const UpsampleSoftmaxAdd&, int64_t begin, int64_t end,
                           void* scratch)

}  // namespace pspnet_fast
