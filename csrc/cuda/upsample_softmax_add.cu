// upsample_softmax_add on the GPU. The maths stands in pspnet_fast/ops/upsample_softmax_add.py.
//
// A launch for every window: launches on a stream follow each other, so where windows overlap they are added in their order,
// without atomics, and the corners are arguments, so that nothing is copied to the device. To walk the windows within one
// launch would save nothing: a pixel's classes are too many for registers, and the total would come by as often.

#include "upsample_softmax_add.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

#include "cuda/launch.h"
#include "cuda/taps.h"
#include "geometry.h"
#include "library.h"

namespace pspnet_fast::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBatch = 8;  // classes whose loads are under way together
// Of shared memory, for the nodes under a block's pixels: with more, too few blocks are on a multiprocessor.
constexpr int64_t kMostShared = 48 * 1024;

// A window, and its part inside of the total: rows and columns as they lie there, after the flip.
struct SoftmaxWindow {
  const void* logits;
  float* total;  // at the part's first pixel
  int64_t class_stride, row_stride, column_stride, total_class_stride, total_row_stride;
  int classes, rows, columns, height, width;
  int first_row, first_column, part_columns, tiles;
  int pitch;  // of a class in shared memory
  float weight;
  bool align_corners, flip;
};

// A pixel's value of a class: between two nodes of the blended row in shared memory, or between four of the logits.
template <class T, bool kShared>
struct Pixel {
  const float *left, *right;
  const T *top_left, *top_right, *bottom_left, *bottom_right;
  float down, across;

  __device__ __forceinline__ float value(const SoftmaxWindow& a, int k) const {
    if constexpr (kShared) {
      return mix(left[k * a.pitch], right[k * a.pitch], across);
    } else {
      const int64_t at = k * a.class_stride;
      return mix(mix(to_float(top_left[at]), to_float(bottom_left[at]), down),
                 mix(to_float(top_right[at]), to_float(bottom_right[at]), down), across);
    }
  }
};

// Grid:      tiles of kThreads pixels of every row of the part inside of the total
// Tile:      kShared: the nodes under the tile, blended along H, to shared memory for all classes. Then a pixel a thread: it
//            walks the classes, kBatch at once, with the largest value and the sum of exponentials relative to it, and
//            walks them again to add
// Traffic:   two rows of nodes for each row of pixels (cached), or four nodes a pixel and class; the total's part read and
//            written once
// Registers: 56, without kShared 126 to 128, no spills
template <class T, bool kShared>
__global__ void __launch_bounds__(kThreads, kShared ? 8 : 4) upsample_softmax_add_kernel(
    const __grid_constant__ SoftmaxWindow a) {
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const int row = block / a.tiles, first = (block - row * a.tiles) * kThreads;
  // Threads past the end do as the last one does, and store nothing.
  const int column = min(first + thread, a.part_columns - 1), placed = a.first_column + column;
  const Tap down = tap_of<int64_t>(a.first_row + row, a.height, a.rows, a.align_corners);
  const Tap across = tap_of<int64_t>(a.flip ? a.width - 1 - placed : placed, a.width, a.columns, a.align_corners);
  const T* const top = static_cast<const T*>(a.logits) + down.lower * a.row_stride;
  const T* const bottom = static_cast<const T*>(a.logits) + down.upper * a.row_stride;
  Pixel<T, kShared> pixel{};
  pixel.down = down.fraction;
  pixel.across = across.fraction;
  if constexpr (kShared) {
    int* const bounds = shared_memory<int>();
    float* const nodes = shared_memory<float>() + 2;
    if (thread == (a.flip ? kThreads - 1 : 0)) {
      bounds[0] = across.lower;
    }
    if (thread == (a.flip ? 0 : kThreads - 1)) {
      bounds[1] = across.upper + 1;
    }
    __syncthreads();
    const int first_node = bounds[0], count = bounds[1] - first_node;
    const bool channels_last = a.class_stride == 1;
    const int inner = channels_last ? a.classes : count;
    for (int i = thread; i < count * a.classes; i += kThreads) {
      const int outer = i / inner, rest = i - outer * inner;
      const int k = channels_last ? rest : outer, node = channels_last ? outer : rest;
      const int64_t at = k * a.class_stride + (first_node + node) * a.column_stride;
      nodes[k * a.pitch + node] = mix(to_float(top[at]), to_float(bottom[at]), down.fraction);
    }
    __syncthreads();
    pixel.left = nodes + (across.lower - first_node);
    pixel.right = nodes + (across.upper - first_node);
  } else {
    pixel.top_left = top + across.lower * a.column_stride;
    pixel.top_right = top + across.upper * a.column_stride;
    pixel.bottom_left = bottom + across.lower * a.column_stride;
    pixel.bottom_right = bottom + across.upper * a.column_stride;
  }
  if (first + thread >= a.part_columns) {
    return;
  }
  float most = -INFINITY, sum = 0, batch[kBatch];
  for (int start = 0; start < a.classes; start += kBatch) {
    float largest = most;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      batch[i] = start + i < a.classes ? pixel.value(a, start + i) : -INFINITY;
      largest = fmaxf(largest, batch[i]);  // leaves NaN out, which gets into the sum by itself
    }
    const float base = largest == -INFINITY ? 0.0f : largest;  // -Inf - -Inf would be NaN
    sum *= expf(most - base);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      sum += expf(batch[i] - base);
    }
    most = largest;
  }
  // Where all classes are -Inf, what is added is NaN, from -Inf - -Inf.
  const float scale = __fdiv_rn(a.weight, sum);
  float* const to = a.total + row * a.total_row_stride + column;
  for (int start = 0; start < a.classes; start += kBatch) {
    float* const classes = to + start * a.total_class_stride;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      batch[i] = start + i < a.classes ? classes[i * a.total_class_stride] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (start + i < a.classes) {
        classes[i * a.total_class_stride] = batch[i] + expf(pixel.value(a, start + i) - most) * scale;
      }
    }
  }
}

// How many nodes lie under the tile that needs the most.
int64_t nodes_of_tiles(const SoftmaxWindow& a) {
  int64_t most = 0;
  for (int64_t start = a.first_column; start < a.first_column + a.part_columns; start += kThreads) {
    const int64_t last = std::min<int64_t>(start + kThreads, a.first_column + a.part_columns) - 1;
    const int64_t from = a.flip ? a.width - 1 - last : start, to = a.flip ? a.width - 1 - start : last;
    most = std::max(most, bilinear_tap<int64_t>(to, a.width, a.columns, a.align_corners).upper -
                              bilinear_tap<int64_t>(from, a.width, a.columns, a.align_corners).lower + 1);
  }
  return most;
}

void upsample_softmax_add_forward(const Tensor& logits, Tensor total, const std::vector<int64_t>& corners,
                                  const std::vector<int64_t>& size, bool align_corners, bool flip, double weight) {
  constexpr const char* op = "upsample_softmax_add_forward";
  const bool channels_last = check_upsample_softmax_add(op, logits, total, corners, size);
  check_cuda_dtype(op, "logits", logits);
  const int64_t classes = logits.size(1), rows = logits.size(2), columns = logits.size(3);
  check(rows < (1 << 24) && columns < (1 << 24) && size[0] < (1 << 24) && size[1] < (1 << 24) && classes < (1 << 30), op,
        "maps must have less than 2^24 rows and columns, and logits less than 2^30 classes, got ", classes, " of ", rows,
        " x ", columns, " to ", size[0], " x ", size[1]);
  const Launcher launch(op, logits);
  SoftmaxWindow a{};
  a.class_stride = channels_last ? 1 : rows * columns;
  a.row_stride = columns * (channels_last ? classes : 1);
  a.column_stride = channels_last ? classes : 1;
  a.total_class_stride = total.size(1) * total.size(2);
  a.total_row_stride = total.size(2);
  a.classes = static_cast<int>(classes);
  a.rows = static_cast<int>(rows);
  a.columns = static_cast<int>(columns);
  a.height = static_cast<int>(size[0]);
  a.width = static_cast<int>(size[1]);
  a.weight = static_cast<float>(weight);
  a.align_corners = align_corners;
  a.flip = flip;
  for (int64_t m = 0; m < logits.size(0); ++m) {
    const int64_t top = corners[2 * m], left = corners[2 * m + 1];
    const int64_t first_row = std::max<int64_t>(-top, 0), last_row = std::min(size[0], total.size(1) - top);
    const int64_t first_column = std::max<int64_t>(-left, 0), last_column = std::min(size[1], total.size(2) - left);
    if (first_row >= last_row || first_column >= last_column) {
      continue;
    }
    a.total = mutable_data<float>(total) + (top + first_row) * a.total_row_stride + left + first_column;
    a.first_row = static_cast<int>(first_row);
    a.first_column = static_cast<int>(first_column);
    a.part_columns = static_cast<int>(last_column - first_column);
    a.tiles = static_cast<int>(divide_up(a.part_columns, kThreads));
    const int64_t blocks = a.tiles * (last_row - first_row);
    // Odd, so that neither threads that write neighbouring classes meet in a bank nor those that write neighbouring nodes.
    const int64_t pitch = nodes_of_tiles(a) | 1;
    const int64_t bytes = static_cast<int64_t>(sizeof(float)) * (2 + classes * pitch);
    a.pitch = static_cast<int>(pitch);
    dispatch_dtype(logits.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      a.logits = data<T>(logits) + m * classes * rows * columns;
      const bool shared = bytes <= kMostShared;
      launch(shared ? upsample_softmax_add_kernel<T, true> : upsample_softmax_add_kernel<T, false>,
             grid_of(op, blocks), kThreads, shared ? static_cast<size_t>(bytes) : 0, a);
    });
  }
}

}  // namespace
}  // namespace pspnet_fast::cuda

PSPNET_FAST_KERNELS(PSPNET_FAST_CUDA_KEY, m) {
  m.impl("upsample_softmax_add_forward", TORCH_BOX(&pspnet_fast::cuda::upsample_softmax_add_forward));
}
