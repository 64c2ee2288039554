// upsample_concat: dispatch, registration, and the scalar kernels.

#include "../upsample_concat.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/make_taps.h"
#include "cpu/upsample_concat.h"
#include "cpu/upsample_concat_kernels.h"
#include "library.h"

namespace pspnet_fast {
namespace {

// How each level is sampled.
class Sampling {
 public:
  Sampling(const ConcatSizes& sizes, const std::vector<int64_t>& bins, Dtype dtype, bool align_corners) {
    int64_t first_cell = 0;
    for (size_t k = 0; k < bins.size(); ++k) {
      const int64_t b = bins[k];
      taps_.emplace_back(sizes.height, b, align_corners, dtype);
      taps_.emplace_back(sizes.width, b, align_corners, dtype);
      levels_.push_back({b, first_cell, sizes.blocks.first_channel[k], taps_[2 * k].axis(), taps_[2 * k + 1].axis()});
      first_cell += b * b;
    }
    arguments_ = {dtype,
                  sizes.channels_last,
                  sizes.reduced,
                  sizes.blocks.total_channels,
                  sizes.height,
                  sizes.width,
                  levels_.data(),
                  static_cast<int64_t>(levels_.size()),
                  first_cell,
                  whole_blocks(sizes.width) * kChannelBlock};
  }

  const UpsampleConcat& arguments() const { return arguments_; }

 private:
  std::vector<Taps> taps_;
  std::vector<UpsampleLevel> levels_;
  UpsampleConcat arguments_;
};

// For a block of planes: the cells, each row of cells stretched to the width of the map, and one of these transposed.
int64_t nchw_scratch(const UpsampleConcat& a) {
  int64_t most = 0;
  for (int64_t k = 0; k < a.level_count; ++k) {
    const int64_t b = a.levels[k].bins;
    most = std::max(most, b * b + b * a.pitch + a.pitch);
  }
  return most * kChannelBlock;
}

// x's planes stand together in both tensors: threads copy equal runs of planes.
void copy_planes(const Tensor& x, const Tensor& out, int64_t first_channel) {
  const int64_t channels = x.size(1), total = out.size(1), plane = x.size(2) * x.size(3);
  const size_t bytes = static_cast<size_t>(plane) * x.element_size();
  const char* const from = static_cast<const char*>(x.const_data_ptr());
  char* const to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, 32768 / plane);
  torch::stable::parallel_for(0, x.size(0) * channels, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t n = begin / channels, channel = begin % channels, count = std::min(end - begin, channels - channel);
      std::memcpy(to + static_cast<size_t>(n * total + first_channel + channel) * bytes,
                  from + static_cast<size_t>(begin) * bytes, static_cast<size_t>(count) * bytes);
      begin += count;
    }
  });
}

// Writes the levels, and in channels_last x with them: pixel by pixel, each pixel's channels at once. No x: null.
void write_levels(const ConcatSizes& sizes, const Tensor* x, const Tensor& pyramid, const Tensor& out,
                  const std::vector<int64_t>& bins, bool align_corners) {
  const Sampling sampling(sizes, bins, dtype_of(out), align_corners);
  const UpsampleConcatForward a{sampling.arguments(),
                                x ? x->const_data_ptr() : nullptr,
                                x ? sizes.channels : 0,
                                x ? sizes.blocks.x_first_channel : 0,
                                pyramid.const_data_ptr(),
                                out.mutable_data_ptr()};
  const auto kernel = PSPNET_FAST_KERNEL(upsample_concat_forward);
  if (sizes.channels_last) {
    const int64_t columns = std::accumulate(bins.begin(), bins.end(), int64_t{0});
    run_kernel(kernel, a, sizes.images * a.height * a.width, a.total_channels, columns * a.reduced);
  } else {
    run_kernel(kernel, a, sizes.images * a.level_count * whole_blocks(a.reduced), kChannelBlock * a.height * a.width,
               nchw_scratch(a));
  }
}

Tensor upsample_concat_forward_cpu(const Tensor& x, const Tensor& pyramid, const std::vector<int64_t>& bins,
                                   const std::vector<int64_t>& order, bool align_corners) {
  const ConcatSizes sizes = check_upsample_concat_forward("upsample_concat_forward", x, pyramid, bins, order);
  Tensor out =
      new_output(x, {sizes.images, sizes.blocks.total_channels, sizes.height, sizes.width}, sizes.channels_last);
  if (out.numel() == 0) {
    return out;
  }
  const bool with_x = sizes.blocks.x_first_channel >= 0;
  if (with_x && !sizes.channels_last) {
    copy_planes(x, out, sizes.blocks.x_first_channel);
  }
  write_levels(sizes, with_x && sizes.channels_last ? &x : nullptr, pyramid, out, bins, align_corners);
  return out;
}

void upsample_concat_fill_cpu(Tensor out, const Tensor& pyramid, const std::vector<int64_t>& bins,
                              const std::vector<int64_t>& order, bool align_corners) {
  const ConcatSizes sizes = check_upsample_concat_fill("upsample_concat_fill", out, pyramid, bins, order);
  if (pyramid.numel() > 0) {
    write_levels(sizes, nullptr, pyramid, out, bins, align_corners);
  }
}

Tensor upsample_concat_backward_cpu(const Tensor& grad, int64_t channels, const std::vector<int64_t>& bins,
                                    const std::vector<int64_t>& order, bool align_corners) {
  const ConcatSizes sizes = check_upsample_concat_backward("upsample_concat_backward", grad, channels, bins, order);
  const Sampling sampling(sizes, bins, dtype_of(grad), align_corners);
  Tensor out = new_output(grad, {sizes.images, sampling.arguments().cell_count, sizes.reduced});
  if (out.numel() == 0) {
    return out;
  }
  const UpsampleConcatBackward a{sampling.arguments(), grad.const_data_ptr(), out.mutable_data_ptr()};
  const int64_t b = *std::max_element(bins.begin(), bins.end());
  run_kernel(PSPNET_FAST_KERNEL(upsample_concat_backward), a, sizes.images * a.level_count * whole_blocks(a.reduced),
             kChannelBlock * a.height * a.width, a.channels_last ? (b * b + b) * a.reduced : nchw_scratch(a));
  return out;
}

}  // namespace
}  // namespace pspnet_fast

PSPNET_FAST_KERNELS(CPU, m) {
  m.impl("upsample_concat_forward", TORCH_BOX(&pspnet_fast::upsample_concat_forward_cpu));
  m.impl("upsample_concat_fill", TORCH_BOX(&pspnet_fast::upsample_concat_fill_cpu));
  m.impl("upsample_concat_backward", TORCH_BOX(&pspnet_fast::upsample_concat_backward_cpu));
}
