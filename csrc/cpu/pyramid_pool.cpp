// pyramid_pool: dispatch, registration, and the scalar kernels.

#include "cpu/pyramid_pool.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/dispatch.h"
#include "cpu/pyramid_pool_kernels.h"
#include "geometry.h"
#include "library.h"

namespace pspnet_fast {
namespace {

std::vector<int64_t> axis_edges(int64_t size, const std::vector<int64_t>& bins) {
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

// The pyramid's windows over a map, in segments.
class Windows {
 public:
  Windows(int64_t height, int64_t width, const std::vector<int64_t>& bins)
      : row_edges_(axis_edges(height, bins)), column_edges_(axis_edges(width, bins)) {
    for (const int64_t b : bins) {
      for (int64_t i = 0; i < b; ++i) {
        const int64_t top = bin_start(i, height, b), bottom = bin_end(i, height, b);
        for (int64_t j = 0; j < b; ++j) {
          const int64_t left = bin_start(j, width, b), right = bin_end(j, width, b);
          cells_.push_back({segment(row_edges_, top), segment(row_edges_, bottom), segment(column_edges_, left),
                            segment(column_edges_, right), (bottom - top) * (right - left)});
        }
      }
    }
  }

  PyramidPool over(Dtype dtype, bool channels_last, int64_t channels) const {
    return {dtype,
            channels_last,
            channels,
            row_edges_.back(),
            column_edges_.back(),
            whole_blocks(column_edges_.back()) * kChannelBlock,
            {row_edges_.data(), static_cast<int64_t>(row_edges_.size()) - 1},
            {column_edges_.data(), static_cast<int64_t>(column_edges_.size()) - 1},
            cells_.data(),
            static_cast<int64_t>(cells_.size())};
  }

 private:
  static int64_t segment(const std::vector<int64_t>& edges, int64_t edge) {
    return std::lower_bound(edges.begin(), edges.end(), edge) - edges.begin();
  }

  std::vector<int64_t> row_edges_, column_edges_;
  std::vector<PoolCell> cells_;
};

Tensor pyramid_pool_forward_cpu(const Tensor& x, const std::vector<int64_t>& bins) {
  constexpr const char* op = "pyramid_pool_forward";
  check(x.dim() == 4, op, "x must be 4-D (N, C, H, W), got ", x.dim(), " dimensions");
  check_dtype(op, "x", x);
  check_bins(op, bins);
  const int64_t n = x.size(0), c = x.size(1), height = x.size(2), width = x.size(3);
  check(height > 0 && width > 0, op, "x must have pixels, got ", height, " x ", width);
  const bool channels_last = check_is_channels_last(op, "x", x);
  Tensor out = new_output(x, {n, level_start(bins.data(), static_cast<int64_t>(bins.size())), c});
  if (out.numel() == 0) {
    return out;
  }
  const Windows windows(height, width, bins);
  const PyramidPoolForward a{windows.over(dtype_of(x), channels_last, c), x.const_data_ptr(), out.mutable_data_ptr()};
  const int64_t segments = a.rows.segments * a.columns.segments;
  const int64_t scratch = channels_last ? segments * std::min(kPoolChunk, c)
                                        : kChannelBlock * (a.rows.segments * a.pitch + a.pitch + segments);
  run_kernel(PSPNET_FAST_KERNEL(pyramid_pool_forward), a, n * whole_blocks(c), kChannelBlock * height * width, scratch);
  return out;
}

Tensor pyramid_pool_backward_cpu(const Tensor& grad, const std::optional<Tensor>& grad_input,
                                 const std::vector<int64_t>& size, const std::vector<int64_t>& bins,
                                 bool channels_last) {
  constexpr const char* op = "pyramid_pool_backward";
  check(grad.dim() == 3, op, "grad must be 3-D (N, S, C), got ", grad.dim(), " dimensions");
  check_dtype(op, "grad", grad);
  check_contiguous(op, "grad", grad);
  check_bins(op, bins);
  check(size.size() == 2 && size[0] > 0 && size[1] > 0, op, "size must be (H, W), got ",
        to_string(size.data(), size.size()));
  const int64_t n = grad.size(0), c = grad.size(2), height = size[0], width = size[1];
  check_size(op, "grad", grad, {n, level_start(bins.data(), static_cast<int64_t>(bins.size())), c});
  if (grad_input) {
    check_like(op, "grad_input", *grad_input, grad);
    check_size(op, "grad_input", *grad_input, {n, c, height, width});
    const int64_t image = grad_input->stride(0), pixel = grad_input->stride(3);
    check(has_strides(*grad_input, channels_last ? std::vector<int64_t>{image, 1, width * pixel, pixel}
                                                 : std::vector<int64_t>{image, height * width, width, 1}),
          op, "grad_input must be a channel slice of a dense tensor, got strides ",
          to_string(grad_input->strides().data(), 4));
  }
  Tensor out = new_output(grad, {n, c, height, width}, channels_last);
  if (out.numel() == 0) {
    return out;
  }
  const Windows windows(height, width, bins);
  const PyramidPoolBackward a{windows.over(dtype_of(grad), channels_last, c),
                              grad.const_data_ptr(),
                              grad_input ? grad_input->const_data_ptr() : nullptr,
                              grad_input ? grad_input->stride(0) : 0,
                              grad_input ? grad_input->stride(3) : 0,
                              out.mutable_data_ptr()};
  const auto kernel = PSPNET_FAST_KERNEL(pyramid_pool_backward);
  if (channels_last) {
    run_kernel(kernel, a, n * height, width * c, a.columns.segments * c);
  } else {
    run_kernel(kernel, a, n * whole_blocks(c), kChannelBlock * height * width,
               kChannelBlock * (a.rows.segments * a.pitch + a.columns.segments));
  }
  return out;
}

}  // namespace
}  // namespace pspnet_fast

PSPNET_FAST_KERNELS(CPU, m) {
  m.impl("pyramid_pool_forward", TORCH_BOX(&pspnet_fast::pyramid_pool_forward_cpu));
  m.impl("pyramid_pool_backward", TORCH_BOX(&pspnet_fast::pyramid_pool_backward_cpu));
}
