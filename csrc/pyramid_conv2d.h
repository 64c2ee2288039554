// What the CPU and the CUDA version of pyramid_conv2d share: argument checks, and which terms make up a sum.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "checks.h"
#include "geometry.h"

namespace pspnet_fast {

// The sizes that an op's arguments, checked, come to.
struct Conv2dSizes {
  int64_t images, channels, rows, columns;  // of the convolution
  int64_t height, width;                    // of the upsampled levels
  int64_t kernel_size, padding, cells;
  bool channels_last, align_corners;
};

inline Conv2dSizes check_conv2d_map(const char* op, const char* name, const Tensor& map,
                                    const std::vector<int64_t>& size, const std::vector<int64_t>& bins,
                                    int64_t kernel_size, int64_t padding, bool align_corners) {
  check(map.dim() == 4, op, name, " must be 4-D (N, O, H', W'), got ", map.dim(), " dimensions");
  check_dtype(op, name, map);
  check_bins(op, bins);
  check(kernel_size > 0 && padding >= 0 && kernel_size <= kMostLength && padding <= kMostLength, op,
        "kernel_size must be positive and padding not negative, both at most 2^30, got ", kernel_size, " and ", padding);
  check_map_size(op, size);
  const int64_t grown = 2 * padding - kernel_size + 1;
  check_size(op, name, map, {map.size(0), map.size(1), size[0] + grown, size[1] + grown});
  return {map.size(0),
          map.size(1),
          map.size(2),
          map.size(3),
          size[0],
          size[1],
          kernel_size,
          padding,
          level_start(bins.data(), static_cast<int64_t>(bins.size())),
          check_is_channels_last(op, name, map),
          align_corners};
}

// Float64 for float64, else float32: taps, scale and shift.
inline ScalarType accumulator_of(const Tensor& map) {
  return map.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_conv2d_taps(const char* op, const Tensor& taps, const Tensor& out, const Conv2dSizes& sizes) {
  check_size(op, "taps", taps, {sizes.images, sizes.cells, sizes.kernel_size * sizes.kernel_size, sizes.channels});
  check(taps.scalar_type() == accumulator_of(out), op, "taps must be float32, or float64 for float64");
  check_same_device(op, "taps", taps, out);
  check_contiguous(op, "taps", taps);
}

// A folded norm's factor, or null.
inline const void* check_conv2d_factor(const char* op, const char* name, const std::optional<Tensor>& factor,
                                       const Tensor& out, const Conv2dSizes& sizes) {
  if (!factor) {
    return nullptr;
  }
  check_size(op, name, *factor, {sizes.channels});
  check(factor->scalar_type() == accumulator_of(out), op, name, " must be float32, or float64 for float64");
  check_same_device(op, name, *factor, out);
  check_contiguous(op, name, *factor);
  return factor->const_data_ptr();
}

// Calls body(cell, weight) for the cells, at most two, that pixel `i` of an axis samples; none outside the map.
template <class Body>
void for_each_tap(int64_t i, int64_t size, int64_t cells, bool align_corners, bool wide, Body body) {
  if (i < 0 || i >= size) {
    return;
  }
  const BilinearTap tap = bilinear_tap(i, size, cells, align_corners);
  if (tap.lower == tap.upper) {
    body(tap.lower, 1.0);
    return;
  }
  if (wide) {
    const double fraction = static_cast<double>(tap.numerator) / static_cast<double>(tap.denominator);
    body(tap.lower, 1 - fraction);
    body(tap.upper, fraction);
  } else {
    const float fraction = static_cast<float>(tap.numerator) / static_cast<float>(tap.denominator);
    body(tap.lower, static_cast<double>(1 - fraction));
    body(tap.upper, static_cast<double>(fraction));
  }
}

}  // namespace pspnet_fast
