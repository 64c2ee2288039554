// upsample_cross_entropy on the GPU. The maths stands in pspnet_fast/ops/upsample_cross_entropy.py.
//
// Two kernels. The first walks the pixels: each one's loss, and what its gradient needs, its largest class and a few factors.
// The second walks the cells: each gathers its gradient from the pixels around it, whose exponentials are computed again, so
// that nothing is added by two blocks and nothing of the size of the upsampled logits is kept. Past 300 lines: the second
// computes again what the first did, and is read beside it.

#include <cuda_runtime.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/taps.h"
#include "geometry.h"
#include "library.h"
#include "upsample_cross_entropy.h"

namespace pspnet_fast::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kClasses = 64;                     // of a block that gathers, one a thread
constexpr int kShares = kThreads / kClasses;     // of a row's pixels: threads with the same class take turns

// What a pixel's gradient needs: factor * exp(v - most) - [target] aim - each w[c].
struct alignas(16) PixelState {
  float most, factor, aim, each;
};

struct CrossEntropy {
  int classes, cell_rows, cell_columns, height, width;
  int64_t class_stride, cell_stride;
  const void *logits, *target;
  const float *weight, *pixel_weight;
  int64_t ignore_index;
  float smoothing;
  bool align_corners, target_is_bytes;
  float* losses;
  float* sums;        // (3, blocks)
  PixelState* state;
  float* gradient;
};

__device__ __forceinline__ int64_t target_at(const CrossEntropy& a, int64_t at) {
  return a.target_is_bytes ? static_cast<const uint8_t*>(a.target)[at] : static_cast<const int64_t*>(a.target)[at];
}

// The sum over the block's threads, in thread 0; always added in the same order.
__device__ __forceinline__ float block_sum(float value) {
  float* const warps = shared_memory<float>();
  const float sum = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) {
    warps[threadIdx.x / kWarp] = sum;
  }
  __syncthreads();
  float total = 0;
  for (int i = 0; i < kThreads / kWarp; ++i) {
    total += warps[i];
  }
  return total;
}

// Losses or their sums, and the state that the gradient needs.
//
// Grid:      (tiles of an output row, output rows, images)
// Tile:      128 pixels, one a thread, which walks the classes: the largest so far and the sum are kept up to date
// Traffic:   reads the target and, for every pixel, four cells (cached); writes 4 * N*H*W for a gradient
// Registers: 40 (sm_80), 40 (sm_90), no spills; nothing is kept for a class
template <class T>
__global__ void __launch_bounds__(kThreads) upsample_cross_entropy_pixels_kernel(const __grid_constant__ CrossEntropy a) {
  const int x = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x), y = blockIdx.y;
  const int64_t n = blockIdx.z, at = (n * a.height + y) * a.width + x;
  const bool inside = x < a.width;
  const int64_t target = inside ? target_at(a, at) : -1;
  const float pixel_weight = !inside ? 0.0f : a.pixel_weight == nullptr ? 1.0f : a.pixel_weight[at];
  const bool counts = inside && target != a.ignore_index && target >= 0 && target < a.classes && pixel_weight != 0;
  float loss = 0, target_weight = 0;
  PixelState state{};
  if (counts) {
    const Tap row = tap_of(y, a.height, a.cell_rows, a.align_corners);
    const Tap column = tap_of(x, a.width, a.cell_columns, a.align_corners);
    const T* const image = static_cast<const T*>(a.logits) + n * a.classes * a.cell_rows * a.cell_columns;
    const T* upper_left = image + (row.lower * a.cell_columns + column.lower) * a.cell_stride;
    const T* upper_right = image + (row.lower * a.cell_columns + column.upper) * a.cell_stride;
    const T* lower_left = image + (row.upper * a.cell_columns + column.lower) * a.cell_stride;
    const T* lower_right = image + (row.upper * a.cell_columns + column.upper) * a.cell_stride;
    float most = -INFINITY, base = 0, total = 0, of_target = 0, weight_sum = 0, below = 0;
    for (int k = 0; k < a.classes; ++k) {
      const float left = mix(to_float(*upper_left), to_float(*lower_left), row.fraction);
      const float right = mix(to_float(*upper_right), to_float(*lower_right), row.fraction);
      const float value = mix(left, right, column.fraction);
      of_target = k == target ? value : of_target;
      // While all are -inf, 0 is subtracted: the sum stays 0.
      const bool larger = value > most;
      const float next_base = larger ? value : base;
      most = larger ? value : most;
      if (a.smoothing > 0) {
        const float weight = a.weight == nullptr ? 1.0f : a.weight[k];
        below += weight_sum * (next_base - base) + weight * (next_base - value);
        weight_sum += weight;
      }
      total = total * expf(fminf(base - next_base, 0.0f)) +  // at first the base is 0, above the largest
               expf(value - next_base);
      base = next_base;
      upper_left += a.class_stride;
      upper_right += a.class_stride;
      lower_left += a.class_stride;
      lower_right += a.class_stride;
    }
    total = total == 0 ? NAN : total;
    target_weight = a.weight == nullptr ? 1.0f : a.weight[target];
    const float each = a.smoothing / static_cast<float>(a.classes), aim = (1 - a.smoothing) * target_weight;
    const float factor = a.smoothing > 0 ? aim + each * weight_sum : aim;
    loss = factor * logf(total) + aim * (most - of_target);
    if (a.smoothing > 0) {
      loss += each * below;
    }
    state = {most, pixel_weight * factor / total, pixel_weight * aim, pixel_weight * each};
  }
  if (inside && a.losses != nullptr) {
    a.losses[at] = loss;
  }
  if (inside && a.state != nullptr) {
    a.state[at] = state;
  }
  if (a.sums != nullptr) {
    const int64_t blocks = static_cast<int64_t>(gridDim.x) * gridDim.y * gridDim.z;
    const int64_t block = (n * gridDim.y + y) * gridDim.x + blockIdx.x;
    const float sums[3] = {counts ? pixel_weight * loss : 0, counts ? pixel_weight * target_weight : 0,
                           counts ? 1.0f : 0.0f};
    for (int i = 0; i < 3; ++i) {
      const float sum = block_sum(sums[i]);
      if (threadIdx.x == 0) {
        a.sums[i * blocks + block] = sum;
      }
    }
  }
}

// The first lower cell of the pixels that `cell` is part of.
__device__ __forceinline__ int first_cell(int cell, int size, int cells) {
  return size == cells || cell == 0 ? cell : cell - 1;
}

// The gradient of the logits, gathered.
//
// Grid:      (cells of a row times blocks of 64 classes, rows of cells, images)
// Tile:      64 classes, one a thread, two threads a class; the pixels of the four squares around the cell
// Traffic:   reads 9 cells and the state of the pixels around (cached: each is read by four cells); writes N*K*h*w
// Registers: 64 to 68, no spills: four corners and one sum a thread
template <class T>
__global__ void __launch_bounds__(kThreads, 4) upsample_cross_entropy_gradient_kernel(
    const __grid_constant__ CrossEntropy a) {
  const int h = a.cell_rows, w = a.cell_columns;
  const int x = static_cast<int>(blockIdx.x) % w, y = blockIdx.y;
  const int k = static_cast<int>(blockIdx.x) / w * kClasses + static_cast<int>(threadIdx.x) % kClasses;
  const int share = static_cast<int>(threadIdx.x) / kClasses;
  const int64_t n = blockIdx.z, first = n * a.classes * h * w + k * a.class_stride;
  const bool inside = k < a.classes;
  float total = 0;
  if (inside) {
    const T* const cells = static_cast<const T*>(a.logits) + first;
    const float class_weight = a.weight == nullptr ? 1.0f : a.weight[k];
#pragma unroll 1
    for (int top = first_cell(y, a.height, h); top <= y; ++top) {
      const int bottom = next_cell(top, a.height, h);
      const int rows_end = static_cast<int>(tap_start(top + 1, a.height, h, a.align_corners));
#pragma unroll 1
      for (int left = first_cell(x, a.width, w); left <= x; ++left) {
        const int right = next_cell(left, a.width, w);
        const float top_left = to_float(cells[(top * w + left) * a.cell_stride]);
        const float top_right = to_float(cells[(top * w + right) * a.cell_stride]);
        const float bottom_left = to_float(cells[(bottom * w + left) * a.cell_stride]);
        const float bottom_right = to_float(cells[(bottom * w + right) * a.cell_stride]);
        const int columns = static_cast<int>(tap_start(left, a.width, w, a.align_corners));
        const int columns_end = static_cast<int>(tap_start(left + 1, a.width, w, a.align_corners));
#pragma unroll 1
        for (int j = static_cast<int>(tap_start(top, a.height, h, a.align_corners)); j < rows_end; ++j) {
          const float f = upper_weight(j, top, a.height, h, a.align_corners);
          const float left_value = mix(top_left, bottom_left, f), right_value = mix(top_right, bottom_right, f);
          // What the cell is to this row: its upper or its lower neighbour, on the last row of cells both.
          const float row_share = (top == y ? 1 - f : 0.0f) + (bottom == y ? f : 0.0f);
#pragma unroll 1
          for (int i = columns + share; i < columns_end; i += kShares) {
            const int64_t at = (n * a.height + j) * a.width + i;
            const PixelState pixel = a.state[at];
            if (pixel.factor != 0) {
              const float g = upper_weight(i, left, a.width, w, a.align_corners);
              const float column_share = (left == x ? 1 - g : 0.0f) + (right == x ? g : 0.0f);
              float gradient = pixel.factor * expf(mix(left_value, right_value, g) - pixel.most);
              gradient -= k == target_at(a, at) ? pixel.aim : 0.0f;
              gradient -= a.smoothing > 0 ? pixel.each * class_weight : 0.0f;
              total += row_share * column_share * gradient;
            }
          }
        }
      }
    }
  }
  float* const shares = shared_memory<float>();
  shares[threadIdx.x] = total;
  __syncthreads();
  if (inside && share == 0) {
    for (int i = 1; i < kShares; ++i) {
      total += shares[i * kClasses + threadIdx.x];
    }
    a.gradient[first + (y * w + x) * a.cell_stride] = total;
  }
}

void run(const char* op, const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
         const std::optional<Tensor>& pixel_weight, int64_t ignore_index, double label_smoothing, bool align_corners,
         float* losses, Tensor* sums, float* gradient) {
  const CrossEntropySizes s = check_upsample_cross_entropy(op, logits, target);
  check_cuda_dtype(op, "logits", logits);
  constexpr int64_t kMost = 32767;
  check(s.cell_rows <= kMost && s.cell_columns <= kMost && s.height <= kMost && s.width <= kMost, op,
        "maps must be at most 32767 x 32767, got ", s.cell_rows, " x ", s.cell_columns, " to ", s.height, " x ", s.width);
  check(s.images <= 65535, op, "logits must hold at most 65535 images, got ", s.images);
  const dim3 pixels(static_cast<unsigned>(divide_up(s.width, kThreads)), static_cast<unsigned>(s.height),
                    static_cast<unsigned>(s.images));
  const int64_t blocks = static_cast<int64_t>(pixels.x) * pixels.y * s.images;
  if (sums != nullptr) {
    *sums = new_tensor(logits, {3, blocks}, ScalarType::Float);
  }
  if (s.images == 0) {
    return;
  }
  const Tensor state = new_tensor(logits, {gradient == nullptr ? 0 : 4 * s.images * s.height * s.width},
                                  ScalarType::Float);
  const CrossEntropy a{static_cast<int>(s.classes),
                       static_cast<int>(s.cell_rows),
                       static_cast<int>(s.cell_columns),
                       static_cast<int>(s.height),
                       static_cast<int>(s.width),
                       s.channels_last ? 1 : s.cell_rows * s.cell_columns,
                       s.channels_last ? s.classes : 1,
                       logits.const_data_ptr(),
                       target.const_data_ptr(),
                       static_cast<const float*>(
                           check_accumulators(op, "weight", weight, logits, s.accumulator, {s.classes})),
                       static_cast<const float*>(check_accumulators(op, "pixel_weight", pixel_weight, logits,
                                                                    s.accumulator, {s.images, s.height, s.width})),
                       ignore_index,
                       static_cast<float>(label_smoothing),
                       align_corners,
                       s.target_is_bytes,
                       losses,
                       sums == nullptr ? nullptr : mutable_data<float>(*sums),
                       gradient == nullptr ? nullptr : static_cast<PixelState*>(state.mutable_data_ptr()),
                       gradient};
  const Launcher launch(op, logits);
  dispatch_dtype(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    launch(upsample_cross_entropy_pixels_kernel<T>, pixels, kThreads, kThreads / kWarp * sizeof(float), a);
    if (gradient != nullptr) {
      const dim3 cells(static_cast<unsigned>(s.cell_columns * divide_up(s.classes, kClasses)),
                       static_cast<unsigned>(s.cell_rows), static_cast<unsigned>(s.images));
      launch(upsample_cross_entropy_gradient_kernel<T>, cells, kThreads, kThreads * sizeof(float), a);
    }
  });
}

Tensor upsample_cross_entropy_losses(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                                     int64_t ignore_index, double label_smoothing, bool align_corners) {
  constexpr const char* op = "upsample_cross_entropy_losses";
  const CrossEntropySizes s = check_upsample_cross_entropy(op, logits, target);
  Tensor losses = new_tensor(logits, {s.images, s.height, s.width}, ScalarType::Float);
  run(op, logits, target, weight, std::nullopt, ignore_index, label_smoothing, align_corners,
      mutable_data<float>(losses), nullptr, nullptr);
  return losses;
}

std::tuple<Tensor, Tensor> upsample_cross_entropy_sums(const Tensor& logits, const Tensor& target,
                                                       const std::optional<Tensor>& weight,
                                                       const std::optional<Tensor>& pixel_weight, int64_t ignore_index,
                                                       double label_smoothing, bool align_corners, bool with_gradient) {
  constexpr const char* op = "upsample_cross_entropy_sums";
  const CrossEntropySizes s = check_upsample_cross_entropy(op, logits, target);
  Tensor gradient = with_gradient ? new_tensor(logits, {s.images, s.classes, s.cell_rows, s.cell_columns},
                                               ScalarType::Float, s.channels_last)
                                  : new_tensor(logits, {0}, ScalarType::Float);
  Tensor parts = new_tensor(logits, {0}, ScalarType::Float);
  run(op, logits, target, weight, pixel_weight, ignore_index, label_smoothing, align_corners, nullptr, &parts,
      with_gradient ? mutable_data<float>(gradient) : nullptr);
  const int64_t last = 1;
  return {torch::stable::sum(parts, torch::headeronly::IntHeaderOnlyArrayRef(&last, 1)), gradient};
}

}  // namespace
}  // namespace pspnet_fast::cuda

PSPNET_FAST_KERNELS(PSPNET_FAST_CUDA_KEY, m) {
  m.impl("upsample_cross_entropy_losses", TORCH_BOX(&pspnet_fast::cuda::upsample_cross_entropy_losses));
  m.impl("upsample_cross_entropy_sums", TORCH_BOX(&pspnet_fast::cuda::upsample_cross_entropy_sums));
}
