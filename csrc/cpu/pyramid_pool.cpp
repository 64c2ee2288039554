// pyramid_pool: dispatch, registration, and the scalar kernels.

#include "cpu/pyramid_pool.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../pyramid_pool.h"
#include "cpu/dispatch.h"
#include "cpu/pyramid_pool_kernels.h"
#include "library.h"

namespace pspnet_fast {
namespace {

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
          cells_.push_back({segment_at(row_edges_, top), segment_at(row_edges_, bottom),
                            segment_at(column_edges_, left), segment_at(column_edges_, right),
                            (bottom - top) * (right - left)});
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
  std::vector<int64_t> row_edges_, column_edges_;
  std::vector<PoolCell> cells_;
};

// `copy` has x's channels from `first_channel` on, or is null.
Tensor pool(const Tensor& x, const std::vector<int64_t>& bins, const PoolSizes& sizes, const Tensor* copy,
            int64_t first_channel) {
  const auto [n, c, height, width, cells, channels_last] = sizes;
  Tensor out = new_output(x, {n, cells, c});
  if (out.numel() == 0) {
    return out;
  }
  const Windows windows(height, width, bins);
  PyramidPoolForward a{windows.over(dtype_of(x), channels_last, c), x.const_data_ptr(), out.mutable_data_ptr(), nullptr,
                       0};
  if (copy != nullptr) {
    const int64_t offset = first_channel * (channels_last ? 1 : height * width);
    a.copy = static_cast<char*>(copy->mutable_data_ptr()) + offset * static_cast<int64_t>(x.element_size());
    a.copy_channels = copy->size(1);
  }
  const int64_t segments = a.rows.segments * a.columns.segments;
  const int64_t scratch = channels_last ? segments * std::min(kPoolChunk, c)
                                        : kChannelBlock * (a.rows.segments * a.pitch + a.pitch + segments);
  run_kernel(PSPNET_FAST_KERNEL(pyramid_pool_forward), a, n * whole_blocks(c), kChannelBlock * height * width, scratch);
  return out;
}

Tensor pyramid_pool_forward_cpu(const Tensor& x, const std::vector<int64_t>& bins) {
  return pool(x, bins, check_pyramid_pool("pyramid_pool_forward", x, bins), nullptr, 0);
}

std::tuple<Tensor, Tensor> pyramid_pool_concat_cpu(const Tensor& x, const std::vector<int64_t>& bins, int64_t channels,
                                                   int64_t first_channel) {
  const PoolSizes sizes = check_pyramid_pool_concat("pyramid_pool_concat", x, bins, channels, first_channel);
  const Tensor out = new_output(x, {sizes.n, channels, sizes.height, sizes.width}, sizes.channels_last);
  const Tensor pyramid = pool(x, bins, sizes, &out, first_channel);
  return {pyramid, out};
}

Tensor pyramid_pool_backward_cpu(const Tensor& grad, const std::optional<Tensor>& grad_input,
                                 const std::vector<int64_t>& size, const std::vector<int64_t>& bins,
                                 bool channels_last) {
  const PoolSizes sizes =
      check_pyramid_pool_backward("pyramid_pool_backward", grad, grad_input, size, bins, channels_last);
  const int64_t n = sizes.n, c = sizes.c, height = sizes.height, width = sizes.width;
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
  m.impl("pyramid_pool_concat", TORCH_BOX(&pspnet_fast::pyramid_pool_concat_cpu));
  m.impl("pyramid_pool_backward", TORCH_BOX(&pspnet_fast::pyramid_pool_backward_cpu));
}
