// pyramid_conv2d on the GPU: tiles, launches, registration. The kernels stand in pyramid_conv2d_kernels.h.

#include "../pyramid_conv2d.h"

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "cuda/launch.h"
#include "cuda/pyramid_conv2d_kernels.h"
#include "library.h"

namespace pspnet_fast::cuda {
namespace {

using namespace conv2d;

constexpr int64_t kMostTileRows = 64;
constexpr int64_t kLeastSplitRows = 16;     // tiles of fewer rows make the bands again too often
constexpr int64_t kSharedBytes = 72 * 1024;  // of a forward block where rows can be had for it: three on a multiprocessor
constexpr int64_t kChunkBytes = 32 * 1024;  // of the gradient's rows, staged at once

Conv2d conv_of(const char* op, const Conv2dSizes& sizes, const std::vector<int64_t>& bins) {
  check(bins.size() <= kMostLevels, op, "at most ", kMostLevels, " levels for the cuda backend, got ", bins.size());
  Conv2d conv{};
  conv.images = narrow(op, "N", sizes.images);
  conv.channels = narrow(op, "O", sizes.channels);
  conv.rows = narrow(op, "H'", sizes.rows);
  conv.columns = narrow(op, "W'", sizes.columns);
  conv.height = static_cast<int>(sizes.height);
  conv.width = static_cast<int>(sizes.width);
  conv.kernel_size = narrow(op, "kernel_size", sizes.kernel_size);
  conv.padding = narrow(op, "padding", sizes.padding);
  conv.align_corners = sizes.align_corners;
  int64_t cells = 0, bands = 0;
  for (const int64_t b : bins) {
    narrow(op, "(2 * size + 1) * (bins + 1)", (2 * std::max(sizes.height, sizes.width) + 1) * (b + 1));
    conv.levels[conv.level_count++] = {static_cast<int>(b), narrow(op, "S", cells), narrow(op, "the bands", bands), 0, 0};
    cells += b * b;
    bands += b * sizes.kernel_size;
  }
  conv.cells = narrow(op, "S", cells);
  conv.bands = narrow(op, "the bands", bands);
  return conv;
}

// Calls body with the largest of kMost, kMost / 2 ... 1 that divides `count` and to which the pointer is aligned.
template <int kMost, class T, class Body>
void with_access(int64_t count, const T* pointer, Body body) {
  if constexpr (kMost > 1) {
    if (count % kMost != 0 || !is_aligned(pointer, kMost * static_cast<int64_t>(sizeof(T)))) {
      return with_access<kMost / 2>(count, pointer, body);
    }
  }
  body(std::integral_constant<int, kMost>{});
}

// Chooses which rows of cells a block of `rows` rows keeps. Returns how many bands these have.
int64_t keep_rows(Conv2d& conv, int64_t rows) {
  int64_t slots = 0;
  for (int l = 0; l < conv.level_count; ++l) {
    Level& level = conv.levels[l];
    const int64_t sources = std::min<int64_t>(rows + conv.kernel_size - 1, conv.height);
    level.kept_rows = static_cast<int>(std::min<int64_t>(level.bins, sources * level.bins / conv.height + 3));
    level.first_slot = static_cast<int>(slots);
    slots += int64_t{level.kept_rows} * conv.kernel_size;
  }
  return slots;
}

template <class T, bool kChannelsLast>
void forward(const char* op, const Launcher& launch, Forward<T> a) {
  Conv2d& conv = a.conv;
  const int64_t inner = kChannelsLast ? conv.channels : conv.columns, outer = kChannelsLast ? conv.columns : conv.channels;
  a.inner_tiles = static_cast<int>(divide_up(inner, kInner));
  a.outer_tiles = static_cast<int>(divide_up(outer, kOuter));
  const int64_t columns = int64_t{conv.images} * a.inner_tiles * a.outer_tiles;
  int64_t bytes = 0;
  const auto fits = [&](int64_t rows, int64_t most) {
    const int64_t pairs = int64_t{conv.level_count} * conv.kernel_size;
    bytes = pairs * divide_up(rows, kGroupRows) * static_cast<int64_t>(sizeof(RowTaps)) +
            pairs * kTilePixels<kChannelsLast> * static_cast<int64_t>(sizeof(Tap)) +
            (keep_rows(conv, rows) + 2) * kTile * static_cast<int64_t>(sizeof(float));
    return bytes <= most;
  };
  int64_t rows = std::min<int64_t>(kMostTileRows, divide_up(conv.rows, kGroupRows) * kGroupRows);
  while (rows > kLeastSplitRows && columns * divide_up(conv.rows, rows) < launch.device().multiprocessors) {
    rows = divide_up(rows / 2, kGroupRows) * kGroupRows;
  }
  while (rows > kLeastSplitRows && !fits(rows, kSharedBytes)) {
    rows = divide_up(rows / 2, kGroupRows) * kGroupRows;
  }
  while (rows > kGroupRows && !fits(rows, launch.device().shared_bytes)) {
    rows = divide_up(rows / 2, kGroupRows) * kGroupRows;
  }
  if (!fits(rows, launch.device().shared_bytes)) {
    const int64_t elements = int64_t{conv.images} * conv.channels * conv.rows * conv.columns;
    launch(pyramid_conv2d_forward_elements_kernel<T, kChannelsLast>, grid_of(op, divide_up(elements, kForwardThreads)),
           kForwardThreads, 0, a);
    return;
  }
  a.tile_rows = static_cast<int>(rows);
  a.groups = static_cast<int>(divide_up(rows, kGroupRows));
  a.row_tiles = static_cast<int>(divide_up(conv.rows, rows));
  with_access<kChannelsLast ? kVector<T> : kQuad>(inner, a.out, [&](auto access) {
    launch(pyramid_conv2d_forward_kernel<T, access, kChannelsLast>, grid_of(op, columns * a.row_tiles), kForwardThreads,
           static_cast<size_t>(bytes), a);
  });
}

void pyramid_conv2d_forward(Tensor out, const Tensor& taps, const std::optional<Tensor>& scale,
                            const std::optional<Tensor>& shift, bool add, bool relu, const std::vector<int64_t>& size,
                            const std::vector<int64_t>& bins, int64_t kernel_size, int64_t padding, bool align_corners) {
  constexpr const char* op = "pyramid_conv2d_forward";
  const Conv2dSizes sizes = check_conv2d_map(op, "out", out, size, bins, kernel_size, padding, align_corners);
  check_cuda_dtype(op, "out", out);
  check_conv2d_taps(op, taps, out, sizes);
  const void* const scales = check_conv2d_factor(op, "scale", scale, out, sizes);
  const void* const shifts = check_conv2d_factor(op, "shift", shift, out, sizes);
  if (out.numel() == 0) {
    return;
  }
  const Launcher launch(op, out);
  dispatch_dtype(out.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Forward<T> a{};
    a.conv = conv_of(op, sizes, bins);
    a.taps = data<float>(taps);
    a.scale = static_cast<const float*>(scales);
    a.shift = static_cast<const float*>(shifts);
    a.out = mutable_data<T>(out);
    a.add = add;
    a.relu = relu;
    a.quads = sizes.channels % kQuad == 0 && is_aligned(a.taps);
    (sizes.channels_last ? forward<T, true> : forward<T, false>)(op, launch, a);
  });
}

template <class T, bool kChannelsLast>
void sum_bands(const char* op, const Launcher& launch, Backward<T> a) {
  const Conv2d& conv = a.conv;
  constexpr int kPixels = kBandTile / kBandChannels<kChannelsLast>;
  a.channel_tiles = static_cast<int>(divide_up(conv.channels, kBandChannels<kChannelsLast>));
  a.pixel_tiles = static_cast<int>(divide_up(conv.columns, kPixels));
  a.chunk = static_cast<int>(
      std::min<int64_t>(conv.rows, kChunkBytes / (kBandTile * static_cast<int64_t>(sizeof(T)))));
  const int64_t sources = divide_up(int64_t{a.chunk} + conv.kernel_size - 1, 4) * 4;
  const int64_t bytes = conv.level_count * sources * static_cast<int64_t>(sizeof(float)) +
                        int64_t{a.chunk} * kBandTile * static_cast<int64_t>(sizeof(T));
  const int threads = std::min(conv.level_count * conv.kernel_size, kBandWarps) * kWarp;
  with_access<kVector<T>>(kChannelsLast ? conv.channels : conv.columns, a.grad, [&](auto access) {
    launch(pyramid_conv2d_backward_bands_kernel<T, access, kChannelsLast>,
           grid_of(op, int64_t{conv.images} * a.channel_tiles * a.pixel_tiles), threads, static_cast<size_t>(bytes), a);
  });
}

Tensor pyramid_conv2d_backward(const Tensor& grad, const std::vector<int64_t>& size, const std::vector<int64_t>& bins,
                               int64_t kernel_size, int64_t padding, bool align_corners) {
  constexpr const char* op = "pyramid_conv2d_backward";
  const Conv2dSizes sizes = check_conv2d_map(op, "grad", grad, size, bins, kernel_size, padding, align_corners);
  check_cuda_dtype(op, "grad", grad);
  const Launcher launch(op, grad);
  Tensor taps = new_tensor(grad, {sizes.images, sizes.cells, kernel_size * kernel_size, sizes.channels}, ScalarType::Float);
  if (taps.numel() == 0) {
    return taps;
  }
  const Conv2d conv = conv_of(op, sizes, bins);
  Tensor bands = new_tensor(grad, {sizes.images, conv.bands, sizes.columns, sizes.channels}, ScalarType::Float);
  dispatch_dtype(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Backward<T> a{};
    a.conv = conv;
    a.grad = data<T>(grad);
    a.bands = mutable_data<float>(bands);
    a.quads = sizes.channels % kQuad == 0;
    (sizes.channels_last ? sum_bands<T, true> : sum_bands<T, false>)(op, launch, a);
  });
  with_access<kQuad>(sizes.channels, data<float>(bands), [&](auto length) {
    const int64_t tiles = divide_up(sizes.channels, int64_t{length} * kWarp);
    launch(pyramid_conv2d_backward_taps_kernel<length>, grid_of(op, sizes.images * conv.bands * tiles), kTapsThreads, 0,
           conv, data<float>(bands), mutable_data<float>(taps), static_cast<int>(tiles));
  });
  return taps;
}

}  // namespace
}  // namespace pspnet_fast::cuda

PSPNET_FAST_KERNELS(PSPNET_FAST_CUDA_KEY, m) {
  m.impl("pyramid_conv2d_forward", TORCH_BOX(&pspnet_fast::cuda::pyramid_conv2d_forward));
  m.impl("pyramid_conv2d_backward", TORCH_BOX(&pspnet_fast::cuda::pyramid_conv2d_backward));
}
