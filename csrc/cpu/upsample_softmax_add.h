// upsample_softmax_add on the CPU: what upsample_softmax_add.cpp prepares for upsample_softmax_add_kernels.h.
#pragma once

#include "cpu/kernel.h"
#include "cpu/taps.h"

namespace pspnet_fast {

struct UpsampleSoftmaxAdd {
  Dtype dtype;
  bool channels_last;
  int64_t windows, classes, rows, columns;  // of the logits
  int64_t height, width;                    // of a window
  int64_t total_height, total_width;
  int64_t pitch, column_pitch;  // the window's and the logits' width, rounded up to whole vectors, and one more
  TapAxis row_taps, column_taps;  // the columns' mirrored where the windows are
  const int64_t* corners;  // (top, left) of every window
  double weight;
  const void* logits;
  float* total;
};

// Pixels of a row that are computed at a time, so that those of 150 classes stay close; a vector's spill beside them.
constexpr int64_t kSoftmaxTile = 64, kSoftmaxPitch = kSoftmaxTile + kChannelBlock;

// Of every class a row of nodes and a tile of pixels; what each pixel is multiplied by, and the fractions of the columns.
constexpr int64_t softmax_scratch(const UpsampleSoftmaxAdd& a) {
  return a.classes * (a.column_pitch + kSoftmaxPitch) + kSoftmaxPitch + a.pitch;
}

// Units [begin, end) are rows of the total. `scratch` has the accumulator's type.
PSPNET_FAST_DECLARE_KERNEL(upsample_softmax_add_forward, const UpsampleSoftmaxAdd&, int64_t begin, int64_t end,
                           void* scratch)

}  // namespace pspnet_fast
