// pyramid_conv2d on the CPU: what pyramid_conv2d.cpp prepares for the kernels of pyramid_conv2d_kernels.h.
#pragma once

#include "cpu/kernel.h"

namespace pspnet_fast {

// One summand: `source` counts whatever the sum is over.
struct Term {
  int64_t source;
  double weight;  // already rounded to the accumulator's type
};

// A matrix with few non-zero weights: row i of it is terms[start[i]] up to terms[start[i + 1]].
struct Sums {
  const int64_t* start;
  const Term* terms;
};

// A band (level k, row of cells i, dy) is what one row of cells and one dy contribute along W.
struct Band {
  int64_t first;  // of its cells' taps (b, k*k) for this dy, in rows of O channels
  int64_t bins, level;
};

struct PyramidConv2d {
  Dtype dtype;
  bool channels_last;
  int64_t images, channels, rows, columns;
  int64_t cell_taps;  // S * k * k
  int64_t kernel_size;
  const Band* bands;
  int64_t band_count;
  const Sums* along_w;  // of every level: forward, of a column over taps; backward, of a (cell, dx) over columns
  Sums along_h;         // forward, of a row over bands; backward, of a band over rows
  int64_t pitch;        // the columns, rounded up to whole vectors
};

struct PyramidConv2dForward : PyramidConv2d {
  const void *taps, *scale, *shift;
  void* out;
  bool add, relu;
};

struct PyramidConv2dBackward : PyramidConv2d {
  const void* grad;
  void* taps;
};

// Channels that a channels_last kernel keeps all bands of at a time.
constexpr int64_t kConv2dChannels = 2 * kChannelBlock;

// Units [begin, end) are blocks of output channels, image after image. `scratch` has the accumulator's type.
PSPNET_FAST_DECLARE_KERNEL(pyramid_conv2d_forward, const PyramidConv2dForward&, int64_t begin, int64_t end,
                           void* scratch)
PSPNET_FAST_DECLARE_KERNEL(pyramid_conv2d_backward, const PyramidConv2dBackward&, int64_t begin, int64_t end,
                           void* scratch)

}  // namespace pspnet_fast
