// What the CPU and the CUDA version of pyramid_pool share: what they ask of their arguments, and how windows cut an axis.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "checks.h"
#include "geometry.h"

namespace pspnet_fast {

struct PoolSizes {
  int64_t n, c, height, width, cells;
  bool channels_last;
};

inline PoolSizes check_pyramid_pool(const char* op, const Tensor& x, const std::vector<int64_t>& bins) {
  check(x.dim() == 4, op, "x must be 4-D (N, C, H, W), got ", x.dim(), " dimensions");
  check_dtype(op, "x", x);
  check_bins(op, bins);
  const int64_t height = x.size(2), width = x.size(3);
  check(height > 0 && width > 0, op, "x must have pixels, got ", height, " x ", width);
  check_axes(op, "x", height, width);
  return {x.size(0),
          x.size(1),
          height,
          width,
          level_start(bins.data(), static_cast<int64_t>(bins.size())),
          check_is_channels_last(op, "x", x)};
}

inline PoolSizes check_pyramid_pool_concat(const char* op, const Tensor& x, const std::vector<int64_t>& bins,
                                           int64_t channels, int64_t first_channel) {
  const PoolSizes sizes = check_pyramid_pool(op, x, bins);
  check(first_channel >= 0 && first_channel <= channels - sizes.c && channels <= INT32_MAX, op,
        "channels from first_channel = ", first_channel, " on, C = ", sizes.c, " of them, must lie within the ", channels,
        " of the result, which are at most 2^31 - 1");
  return sizes;
}

inline PoolSizes check_pyramid_pool_backward(const char* op, const Tensor& grad,
                                             const std::optional<Tensor>& grad_input, const std::vector<int64_t>& size,
                                             const std::vector<int64_t>& bins, bool channels_last) {
  check(grad.dim() == 3, op, "grad must be 3-D (N, S, C), got ", grad.dim(), " dimensions");
  check_dtype(op, "grad", grad);
  check_contiguous(op, "grad", grad);
  check_bins(op, bins);
  check_map_size(op, size);
  const int64_t n = grad.size(0), c = grad.size(2), height = size[0], width = size[1];
  const int64_t cells = level_start(bins.data(), static_cast<int64_t>(bins.size()));
  check_size(op, "grad", grad, {n, cells, c});
  if (grad_input) {
    check_like(op, "grad_input", *grad_input, grad);
    check_size(op, "grad_input", *grad_input, {n, c, height, width});
    const int64_t image = grad_input->stride(0), pixel = grad_input->stride(3);
    check(has_strides(*grad_input, channels_last ? std::vector<int64_t>{image, 1, width * pixel, pixel}
                                                 : std::vector<int64_t>{image, height * width, width, 1}),
          op, "grad_input must be a channel slice of a dense tensor, got strides ",
          to_string(grad_input->strides().data(), 4));
  }
  return {n, c, height, width, cells, channels_last};
}

// The starts and ends of all windows of all levels, from 0 to the size. They cut the axis into segments; every window is
// a run of whole segments.
inline std::vector<int64_t> axis_edges(int64_t size, const std::vector<int64_t>& bins) {
  std::vector<int64_t> edges;
  for (const int64_t b : bins) {
    for (int64_t i = 0; i < b; ++i) {
      edges.push_back(bin_start(i, size, b));
      edges.push_back(bin_end(i, size, b));
    }
  }
  std::sort(edges.begin(), edges.end());
  edges.erase(std::unique(edges.begin(), edges.end()), edges.end());
  return edges;
}

// The segment that starts at an edge.
inline int64_t segment_at(const std::vector<int64_t>& edges, int64_t edge) {
  return std::lower_bound(edges.begin(), edges.end(), edge) - edges.begin();
}

}  // namespace pspnet_fast
