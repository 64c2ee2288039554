// upsample_argmax on the GPU. The maths stands in pspnet_fast/ops/upsample_argmax.py.
//
// Where the logits are stretched far, a block owns the pixels between four nodes, a cell: it keeps the nodes of every
// class in shared memory, and then only looks at classes that may win there. Where cells have few pixels, or there are
// more classes than shared memory holds, a thread owns a pixel and looks at all classes. Past 300 lines: both ways, and the
// choice between them, are read together.

#include "upsample_argmax.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cfloat>
#include <tuple>
#include <vector>

#include "cuda/device.h"
#include "cuda/launch.h"
#include "geometry.h"
#include "library.h"

namespace pspnet_fast::cuda {
namespace {

constexpr int kCellThreads = 64;
constexpr int kCellRows = 32;  // that a block takes of a cell
constexpr int kPixelThreads = 128;
constexpr int64_t kFewPixels = 16;
// A class whose largest node is so far below another's smallest adds less than 1e-13 to the sum of exponentials.
constexpr float kNegligible = 30;

struct UpsampleArgmax {
  const void* logits;
  void* labels;
  float* confidence;  // or null
  int64_t images;
  int64_t class_stride, row_stride, column_stride;
  int classes, rows, columns, height, width, label_bytes;
  bool align_corners;
};

// What a pixel takes of its four nodes: top left, top right, bottom left, bottom right.
struct Weights {
  float at[4];
};

__device__ __forceinline__ Weights weights_of(const BilinearTap<int64_t>& h, const BilinearTap<int64_t>& w) {
  const float down = fraction(static_cast<int>(h.numerator), static_cast<int>(h.denominator));
  const float right = fraction(static_cast<int>(w.numerator), static_cast<int>(w.denominator));
  return {{(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right}};
}

// A product for every node, also where the weight is zero: Inf and NaN go where torch's go.
__device__ __forceinline__ float value_of(const Weights& weights, const Vector<float, 4>& nodes) {
  return weights.at[0] * nodes.at[0] + weights.at[1] * nodes.at[1] + weights.at[2] * nodes.at[2] +
         weights.at[3] * nodes.at[3];
}

// Where a cell's nodes of class 0 stand.
template <class T>
struct Corners {
  const T* at[4];

  __device__ __forceinline__ Corners(const UpsampleArgmax& a, int64_t n, int row, int column) {
    const T* const image = static_cast<const T*>(a.logits) + n * a.classes * a.rows * a.columns;
    const T* const top = image + row * a.row_stride;
    const T* const bottom = image + next_cell(row, a.height, a.rows) * a.row_stride;
    const int64_t left = column * a.column_stride, right = next_cell(column, a.width, a.columns) * a.column_stride;
    at[0] = top + left;
    at[1] = top + right;
    at[2] = bottom + left;
    at[3] = bottom + right;
  }

  __device__ __forceinline__ Vector<float, 4> nodes(int64_t offset) const {
    return {{to_float(at[0][offset]), to_float(at[1][offset]), to_float(at[2][offset]), to_float(at[3][offset])}};
  }
};

// The best class so far: NaN is larger than everything, and of equals the first stays.
struct Best {
  float value = -INFINITY;
  int label = 0;

  __device__ __forceinline__ void consider(float other, int other_label) {
    if (other > value || (other != other && value == value)) {
      value = other;
      label = other_label;
    }
  }
};

__device__ __forceinline__ void store_label(const UpsampleArgmax& a, int64_t at, int label) {
  if (a.label_bytes == 1) {
    static_cast<uint8_t*>(a.labels)[at] = static_cast<uint8_t>(label);
  } else if (a.label_bytes == 4) {
    static_cast<int32_t*>(a.labels)[at] = label;
  } else {
    static_cast<int64_t*>(a.labels)[at] = label;
  }
}

// What a block shares, before the nodes of every class and then the candidates' numbers.
struct Shared {
  int bounds[4];  // the cell's first row, one past its last, and so for columns
  int count;      // of candidates
  float smallest[kCellThreads / kWarp];
  int special[kCellThreads / kWarp];
};

constexpr int64_t kHeader = (sizeof(Shared) + 15) / 16 * 16;

// Grid:    (cells of all images, parts of kCellRows rows of the longest cell)
// Tile:    kCellThreads threads take the classes one each, their nodes to shared memory, and agree on the best smallest
//          node; a warp packs the classes that reach it, in order; then every thread takes a pixel and walks these
// Traffic: the logits read four times (cached: once), N*H*W labels (and confidences) written
// Registers: 48, nothing spilled
template <class T>
__global__ void __launch_bounds__(kCellThreads) upsample_argmax_cells_kernel(const __grid_constant__ UpsampleArgmax a) {
  unsigned char* const memory = shared_memory<unsigned char>();
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  auto* const nodes = reinterpret_cast<Vector<float, 4>*>(memory + kHeader);
  int* const candidates = reinterpret_cast<int*>(nodes + a.classes);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t cells = static_cast<int64_t>(a.rows) * a.columns;
  const int64_t n = blockIdx.x / cells;
  const int cell = static_cast<int>(blockIdx.x - n * cells), row = cell / a.columns, column = cell - row * a.columns;
  if (thread < 4) {
    const bool of_rows = thread < 2;
    shared.bounds[thread] = static_cast<int>(tap_start((of_rows ? row : column) + thread % 2, of_rows ? a.height : a.width,
                                                       of_rows ? a.rows : a.columns, a.align_corners));
  }
  __syncthreads();
  const int h_start = shared.bounds[0] + static_cast<int>(blockIdx.y) * kCellRows;
  const int height = min(shared.bounds[1] - h_start, kCellRows);
  const int w_start = shared.bounds[2], width = shared.bounds[3] - w_start;
  if (height <= 0 || width <= 0) {
    return;
  }
  const Corners<T> corners(a, n, row, column);
  float best_smallest = -INFINITY;
  bool special = false;
  for (int k = thread; k < a.classes; k += kCellThreads) {
    const Vector<float, 4> four = corners.nodes(k * a.class_stride);
    nodes[k] = four;
    best_smallest = fmaxf(best_smallest, fminf(fminf(four.at[0], four.at[1]), fminf(four.at[2], four.at[3])));
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      special = special || !(fabsf(four.at[corner]) <= FLT_MAX);
    }
  }
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    best_smallest = fmaxf(best_smallest, __shfl_xor_sync(0xffffffffu, best_smallest, distance));
  }
  const bool warp_special = __ballot_sync(0xffffffffu, special) != 0;
  if (lane == 0) {
    shared.smallest[warp] = best_smallest;
    shared.special[warp] = warp_special;
  }
  __syncthreads();
  if (warp == 0) {
    bool all = false;
    for (int other = 0; other < kCellThreads / kWarp; ++other) {
      best_smallest = fmaxf(best_smallest, shared.smallest[other]);
      all = all || shared.special[other] != 0;
    }
    const float threshold = best_smallest - (a.confidence == nullptr ? 0.0f : kNegligible);
    int count = 0;
    for (int first = 0; first < a.classes; first += kWarp) {
      const int k = first + lane;
      bool candidate = k < a.classes;
      if (candidate && !all) {
        const Vector<float, 4> four = nodes[k];
        candidate = fmaxf(fmaxf(four.at[0], four.at[1]), fmaxf(four.at[2], four.at[3])) >= threshold;
      }
      const unsigned mask = __ballot_sync(0xffffffffu, candidate);
      if (candidate) {
        candidates[count + __popc(mask & ((1u << lane) - 1))] = k;
      }
      count += __popc(mask);
    }
    if (lane == 0) {
      shared.count = count;
    }
  }
  __syncthreads();
  const int count = shared.count;
  for (int pixel = thread; pixel < height * width; pixel += kCellThreads) {
    const int h = h_start + pixel / width, w = w_start + pixel % width;
    const Weights weights =
        weights_of(bilinear_tap<int64_t>(h, a.height, a.rows, a.align_corners), bilinear_tap<int64_t>(w, a.width, a.columns, a.align_corners));
    Best best;
    for (int i = 0; i < count; ++i) {
      const int k = candidates[i];
      best.consider(value_of(weights, nodes[k]), k);
    }
    const int64_t at = (n * a.height + h) * a.width + w;
    store_label(a, at, best.label);
    if (a.confidence != nullptr) {
      float sum = 0;
      for (int i = 0; i < count; ++i) {
        sum += expf(value_of(weights, nodes[candidates[i]]) - best.value);
      }
      a.confidence[at] = __fdiv_rn(1, sum);
    }
  }
}

// Grid:    blocks of kPixelThreads pixels, image after image
// Tile:    a thread walks all classes of its pixel, for the confidence twice
// Traffic: four nodes a pixel and class (cached), N*H*W labels (and confidences) written
// Registers: 48, nothing spilled
template <class T>
__global__ void __launch_bounds__(kPixelThreads) upsample_argmax_pixels_kernel(const __grid_constant__ UpsampleArgmax a) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kPixelThreads + threadIdx.x;
  if (at >= a.images * a.height * a.width) {
    return;
  }
  const int64_t line = at / a.width, n = line / a.height;
  const BilinearTap<int64_t> down = bilinear_tap<int64_t>(line - n * a.height, a.height, a.rows, a.align_corners);
  const BilinearTap<int64_t> right = bilinear_tap<int64_t>(at - line * a.width, a.width, a.columns, a.align_corners);
  const Weights weights = weights_of(down, right);
  const Corners<T> corners(a, n, static_cast<int>(down.lower), static_cast<int>(right.lower));
  Best best;
#pragma unroll 4
  for (int k = 0; k < a.classes; ++k) {
    best.consider(value_of(weights, corners.nodes(k * a.class_stride)), k);
  }
  store_label(a, at, best.label);
  if (a.confidence != nullptr) {
    float sum = 0;
#pragma unroll 4
    for (int k = 0; k < a.classes; ++k) {
      sum += expf(value_of(weights, corners.nodes(k * a.class_stride)) - best.value);
    }
    a.confidence[at] = __fdiv_rn(1, sum);
  }
}

dim3 grid_of(const char* op, int64_t blocks, int64_t parts = 1) {
  check(blocks < (int64_t{1} << 31) && parts < (int64_t{1} << 16), op, "at most 2^31 blocks of 2^16 parts can be launched, ",
        blocks, " of ", parts, " are needed");
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(parts));
}

void write_labels(const char* op, const Tensor& logits, const ArgmaxSizes& sizes, bool align_corners,
                  const Tensor& labels, float* confidence) {
  check(sizes.rows < (1 << 24) && sizes.columns < (1 << 24) && sizes.height < (1 << 24) && sizes.width < (1 << 24) &&
            sizes.rows * sizes.columns < (int64_t{1} << 31),
        op, "maps must have less than 2^24 rows and columns, and logits less than 2^31 pixels, got ", sizes.rows, " x ",
        sizes.columns, " to ", sizes.height, " x ", sizes.width);
  if (labels.numel() == 0) {
    return;
  }
  UpsampleArgmax a{};
  a.logits = logits.const_data_ptr();
  a.labels = labels.mutable_data_ptr();
  a.confidence = confidence;
  a.images = sizes.images;
  a.class_stride = sizes.channels_last ? 1 : sizes.rows * sizes.columns;
  a.row_stride = sizes.columns * (sizes.channels_last ? sizes.classes : 1);
  a.column_stride = sizes.channels_last ? sizes.classes : 1;
  a.classes = static_cast<int>(sizes.classes);
  a.rows = static_cast<int>(sizes.rows);
  a.columns = static_cast<int>(sizes.columns);
  a.height = static_cast<int>(sizes.height);
  a.width = static_cast<int>(sizes.width);
  a.label_bytes = static_cast<int>(labels.element_size());
  a.align_corners = align_corners;
  const Launcher launch(op, logits);
  const int64_t cells = sizes.rows * sizes.columns, pixels = sizes.height * sizes.width;
  const int64_t bytes = kHeader + sizes.classes * static_cast<int64_t>(sizeof(float) * 4 + sizeof(int));
  int64_t longest = 0;
  for (int64_t i = 0; i < sizes.rows; ++i) {
    longest = std::max(longest, tap_start(i + 1, sizes.height, sizes.rows, align_corners) -
                                    tap_start(i, sizes.height, sizes.rows, align_corners));
  }
  dispatch_dtype(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (pixels >= kFewPixels * cells && bytes <= launch.device().shared_bytes) {
      launch(upsample_argmax_cells_kernel<T>, grid_of(op, sizes.images * cells, divide_up(longest, kCellRows)),
             kCellThreads, static_cast<size_t>(bytes), a);
    } else {
      launch(upsample_argmax_pixels_kernel<T>, grid_of(op, divide_up(sizes.images * pixels, kPixelThreads)),
             kPixelThreads, 0, a);
    }
  });
}

Tensor upsample_argmax_forward(const Tensor& logits, const std::vector<int64_t>& size, bool align_corners,
                               ScalarType dtype) {
  constexpr const char* op = "upsample_argmax_forward";
  const ArgmaxSizes sizes = check_upsample_argmax(op, logits, size, dtype);
  check_cuda_dtype(op, "logits", logits);
  Tensor labels = new_tensor(logits, {sizes.images, sizes.height, sizes.width}, dtype);
  write_labels(op, logits, sizes, align_corners, labels, nullptr);
  return labels;
}

std::tuple<Tensor, Tensor> upsample_argmax_confidence(const Tensor& logits, const std::vector<int64_t>& size,
                                                      bool align_corners, ScalarType dtype) {
  constexpr const char* op = "upsample_argmax_confidence";
  const ArgmaxSizes sizes = check_upsample_argmax(op, logits, size, dtype);
  check_cuda_dtype(op, "logits", logits);
  const std::vector<int64_t> shape{sizes.images, sizes.height, sizes.width};
  Tensor labels = new_tensor(logits, shape, dtype), confidence = new_tensor(logits, shape, ScalarType::Float);
  write_labels(op, logits, sizes, align_corners, labels, mutable_data<float>(confidence));
  return {labels, confidence};
}

}  // namespace
}  // namespace pspnet_fast::cuda

PSPNET_FAST_KERNELS(PSPNET_FAST_CUDA_KEY, m) {
  m.impl("upsample_argmax_forward", TORCH_BOX(&pspnet_fast::cuda::upsample_argmax_forward));
  m.impl("upsample_argmax_confidence", TORCH_BOX(&pspnet_fast::cuda::upsample_argmax_confidence));
}
