// upsample_softmax_add on the GPU. The maths stands in pspnet_fast/ops/upsample_softmax_add.py.
//
// One launch a window, in stream order: where windows overlap they are added in their order, no two blocks write one pixel,
// and the corners are arguments of the launch, so that nothing is copied to the device. A window has enough pixels to fill
// a card.

#include "upsample_softmax_add.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cuda/device.h"
#include "cuda/launch.h"
#include "geometry.h"
#include "library.h"

namespace pspnet_fast::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTogether = 4;  // classes of a pixel that are read before they are written

struct SoftmaxAdd {
  int64_t class_stride, row_stride, column_stride;
  int classes, rows, columns, height, width;
  bool align_corners, flip;
  float weight;
};

// A window, and the rectangle of the total that it covers there.
struct Window {
  const void* logits;
  float* total;  // the rectangle's first pixel in the plane of class 0
  int64_t total_plane, total_row;
  int first_row, first_column;  // of the window, at the rectangle's first pixel; before the flip
  int rectangle_width, tiles;   // of kThreads pixels
};

// The two nodes of a pixel along an axis. One that keeps its size has one, as in torch: a neighbour's NaN is not spread.
struct Tap {
  int lower, upper;
  float fraction;
};

__device__ __forceinline__ Tap tap_of(int i, int size, int cells, bool align_corners) {
  const BilinearTap<int64_t> tap = bilinear_tap<int64_t>(i, size, cells, align_corners);
  return {static_cast<int>(tap.lower), static_cast<int>(size == cells ? tap.lower : tap.upper),
          fraction(static_cast<int>(tap.numerator), static_cast<int>(tap.denominator))};
}

// Each product by itself, so that Inf and NaN go where torch's go.
__device__ __forceinline__ float mix(float lower, float upper, float f) {
  return (1 - f) * lower + f * upper;
}

// Where a pixel's four nodes of class 0 stand, and its value of any class.
template <class T>
struct Pixel {
  const T *top_left, *top_right, *bottom_left, *bottom_right;
  float down, right;

  __device__ __forceinline__ Pixel(const SoftmaxAdd& a, const T* logits, int h, int w) {
    const Tap row = tap_of(h, a.height, a.rows, a.align_corners);
    const Tap column = tap_of(w, a.width, a.columns, a.align_corners);
    top_left = logits + row.lower * a.row_stride + column.lower * a.column_stride;
    top_right = logits + row.lower * a.row_stride + column.upper * a.column_stride;
    bottom_left = logits + row.upper * a.row_stride + column.lower * a.column_stride;
    bottom_right = logits + row.upper * a.row_stride + column.upper * a.column_stride;
    down = row.fraction;
    right = column.fraction;
  }

  __device__ __forceinline__ float value(int64_t offset) const {
    return mix(mix(to_float(top_left[offset]), to_float(bottom_left[offset]), down),
               mix(to_float(top_right[offset]), to_float(bottom_right[offset]), down), right);
  }
};

// Grid:      tiles of the rows of one window that lie in the total
// Tile:      128 pixels of a row, one a thread, which walks the classes for the largest so far and the sum of exponentials,
//            and again to add: neighbours in a warp are neighbours in the total
// Traffic:   four nodes a pixel and class, twice (cached: few nodes serve a warp); the total's part read and written once
// Registers: 56 to 64, nothing spilled
template <class T>
__global__ void __launch_bounds__(kThreads) upsample_softmax_add_forward_kernel(const __grid_constant__ SoftmaxAdd a,
                                                                                const __grid_constant__ Window window) {
  const int row = static_cast<int>(blockIdx.x) / window.tiles;
  const int column = static_cast<int>(blockIdx.x) % window.tiles * kThreads + static_cast<int>(threadIdx.x);
  if (column >= window.rectangle_width) {
    return;
  }
  const int w = window.first_column + column;
  const Pixel<T> pixel(a, static_cast<const T*>(window.logits), window.first_row + row, a.flip ? a.width - 1 - w : w);
  float base = 0, most = -INFINITY, sum = 0;
#pragma unroll 4
  for (int k = 0; k < a.classes; ++k) {
    const float value = pixel.value(k * a.class_stride);
    // While all are -Inf, 0 is subtracted: the sum stays 0.
    const bool larger = value > most;
    const float next_base = larger ? value : base;
    most = larger ? value : most;
    sum = sum * expf(fminf(base - next_base, 0.0f)) +  // at first the base is 0, above the largest
          expf(value - next_base);
    base = next_base;
  }
  const float scale = __fdiv_rn(a.weight, sum);  // of nothing but -Inf: Inf, and 0 times that is NaN
  float* const to = window.total + row * window.total_row + column;
  // Reads of several classes before the first write: the compiler may not move them past one.
  for (int first = 0; first < a.classes; first += kTogether) {
    float after[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int k = min(first + i, a.classes - 1);
      after[i] = to[k * window.total_plane] + expf(pixel.value(k * a.class_stride) - base) * scale;
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i < a.classes) {
        to[(first + i) * window.total_plane] = after[i];
      }
    }
  }
}

void upsample_softmax_add_forward(const Tensor& logits, Tensor total, const std::vector<int64_t>& corners,
                                  const std::vector<int64_t>& size, bool align_corners, bool flip, double weight) {
  constexpr const char* op = "upsample_softmax_add_forward";
  const bool channels_last = check_upsample_softmax_add(op, logits, total, corners, size);
  check_cuda_dtype(op, "logits", logits);
  constexpr int64_t kMost = 1 << 24;
  const int64_t windows = logits.size(0), classes = logits.size(1), rows = logits.size(2), columns = logits.size(3);
  check(rows < kMost && columns < kMost && size[0] < kMost && size[1] < kMost, op,
        "maps must have less than 2^24 rows and columns, got ", rows, " x ", columns, " to ", size[0], " x ", size[1]);
  if (total.numel() == 0 || windows == 0) {
    return;
  }
  const SoftmaxAdd a{channels_last ? 1 : rows * columns,
                     columns * (channels_last ? classes : 1),
                     channels_last ? classes : 1,
                     static_cast<int>(classes),
                     static_cast<int>(rows),
                     static_cast<int>(columns),
                     static_cast<int>(size[0]),
                     static_cast<int>(size[1]),
                     align_corners,
                     flip,
                     static_cast<float>(weight)};
  const int64_t height = total.size(1), width = total.size(2);
  const Launcher launch(op, logits);
  dispatch_dtype(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    for (int64_t m = 0; m < windows; ++m) {
      const int64_t top = corners[2 * m], left = corners[2 * m + 1];
      const int64_t y = std::max<int64_t>(top, 0), y_end = std::min(top + size[0], height);
      const int64_t x = std::max<int64_t>(left, 0), x_end = std::min(left + size[1], width);
      if (y >= y_end || x >= x_end) {
        continue;
      }
      const int64_t tiles = divide_up(x_end - x, kThreads), blocks = (y_end - y) * tiles;
      check(blocks < (int64_t{1} << 31), op, "at most 2^31 blocks can be launched, ", blocks, " are needed");
      const Window window{data<T>(logits) + m * classes * rows * columns,
                          mutable_data<float>(total) + y * width + x,
                          height * width,
                          width,
                          static_cast<int>(y - top),
                          static_cast<int>(x - left),
                          static_cast<int>(x_end - x),
                          static_cast<int>(tiles)};
      launch(upsample_softmax_add_forward_kernel<T>, dim3(static_cast<unsigned>(blocks)), kThreads, 0, a, window);
    }
  });
}

}  // namespace
}  // namespace pspnet_fast::cuda

PSPNET_FAST_KERNELS(PSPNET_FAST_CUDA_KEY, m) {
  m.impl("upsample_softmax_add_forward", TORCH_BOX(&pspnet_fast::cuda::upsample_softmax_add_forward));
}
