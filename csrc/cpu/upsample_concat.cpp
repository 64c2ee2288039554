// upsample_concat: dispatch, registration, and the scalar kernels.

#include "cpu/upsample_concat.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "checks.h"
#include "cpu/dispatch.h"
#include "cpu/upsample_concat_kernels.h"
#include "geometry.h"
#include "library.h"

namespace pspnet_fast {
namespace {

class Taps {
 public:
  Taps(int64_t size, int64_t cells, bool align_corners, Dtype dtype) {
    for (int64_t i = 0; i < size; ++i) {
      const BilinearTap tap = bilinear_tap(i, size, cells, align_corners);
      if (runs_.empty() || runs_.back().lower != tap.lower || runs_.back().upper != tap.upper) {
        runs_.push_back({i, i, tap.lower, tap.upper});
      }
      runs_.back().end = i + 1;
      fraction_.push_back(dtype == Dtype::float64
                              ? static_cast<double>(tap.numerator) / static_cast<double>(tap.denominator)
                              : static_cast<float>(tap.numerator) / static_cast<float>(tap.denominator));
    }
  }

  TapAxis axis() const { return {runs_.data(), static_cast<int64_t>(runs_.size()), fraction_.data()}; }

 private:
  std::vector<TapRun> runs_;
  std::vector<double> fraction_;
};

// Where everything stands in the concatenation, and how each level is sampled.
class Layout {
 public:
  Layout(const char* op, const std::vector<int64_t>& bins, const std::vector<int64_t>& order, int64_t channels,
         int64_t reduced)
      : bins_(bins), first_channel_(bins.size(), -1) {
    for (const int64_t block : order) {
      check(block >= -1 && block < static_cast<int64_t>(bins.size()), op, "order must hold -1 and the levels, got ",
            to_string(order.data(), order.size()));
      int64_t& first = block == -1 ? x_first_channel_ : first_channel_[static_cast<size_t>(block)];
      check(first == -1, op, "order must name a block once, got ", to_string(order.data(), order.size()));
      first = total_channels_;
      total_channels_ += block == -1 ? channels : reduced;
    }
    for (const int64_t first : first_channel_) {
      check(first >= 0, op, "order must name every level, got ", to_string(order.data(), order.size()));
    }
  }

  UpsampleConcat over(Dtype dtype, bool channels_last, int64_t reduced, int64_t height, int64_t width,
                      bool align_corners) {
    int64_t first_cell = 0;
    for (size_t k = 0; k < bins_.size(); ++k) {
      const int64_t b = bins_[k];
      taps_.emplace_back(height, b, align_corners, dtype);
      taps_.emplace_back(width, b, align_corners, dtype);
      levels_.push_back({b, first_cell, first_channel_[k], taps_[2 * k].axis(), taps_[2 * k + 1].axis()});
      first_cell += b * b;
    }
    return {dtype,
            channels_last,
            reduced,
            total_channels_,
            height,
            width,
            levels_.data(),
            static_cast<int64_t>(levels_.size()),
            first_cell,
            whole_blocks(width) * kChannelBlock};
  }

  int64_t x_first_channel() const { return x_first_channel_; }
  int64_t total_channels() const { return total_channels_; }

 private:
  std::vector<int64_t> bins_, first_channel_;
  int64_t x_first_channel_ = -1, total_channels_ = 0;
  std::vector<Taps> taps_;
  std::vector<UpsampleLevel> levels_;
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

Tensor upsample_concat_forward_cpu(const Tensor& x, const Tensor& pyramid, const std::vector<int64_t>& bins,
                                   const std::vector<int64_t>& order, bool align_corners) {
  constexpr const char* op = "upsample_concat_forward";
  check(x.dim() == 4, op, "x must be 4-D (N, C, H, W), got ", x.dim(), " dimensions");
  check_dtype(op, "x", x);
  check_bins(op, bins);
  const int64_t n = x.size(0), c = x.size(1), height = x.size(2), width = x.size(3);
  check(height > 0 && width > 0, op, "x must have pixels, got ", height, " x ", width);
  const bool channels_last = check_is_channels_last(op, "x", x);
  check(pyramid.dim() == 3, op, "pyramid must be 3-D (N, S, R), got ", pyramid.dim(), " dimensions");
  const int64_t reduced = pyramid.size(2);
  check_like(op, "pyramid", pyramid, x);
  check_size(op, "pyramid", pyramid, {n, level_start(bins.data(), static_cast<int64_t>(bins.size())), reduced});
  check_contiguous(op, "pyramid", pyramid);

  Layout layout(op, bins, order, c, reduced);
  Tensor out = new_output(x, {n, layout.total_channels(), height, width}, channels_last);
  if (out.numel() == 0) {
    return out;
  }
  const bool with_x = layout.x_first_channel() >= 0;
  const UpsampleConcatForward a{layout.over(dtype_of(x), channels_last, reduced, height, width, align_corners),
                                x.const_data_ptr(),
                                with_x ? c : 0,
                                with_x ? layout.x_first_channel() : 0,
                                pyramid.const_data_ptr(),
                                out.mutable_data_ptr()};
  const auto kernel = PSPNET_FAST_KERNEL(upsample_concat_forward);
  if (channels_last) {
    const int64_t columns = std::accumulate(bins.begin(), bins.end(), int64_t{0});
    run_kernel(kernel, a, n * height * width, a.total_channels, columns * reduced);
  } else {
    if (with_x) {
      copy_planes(x, out, a.x_first_channel);
    }
    run_kernel(kernel, a, n * a.level_count * whole_blocks(reduced), kChannelBlock * height * width, nchw_scratch(a));
  }
  return out;
}

Tensor upsample_concat_backward_cpu(const Tensor& grad, int64_t channels, const std::vector<int64_t>& bins,
                                    const std::vector<int64_t>& order, bool align_corners) {
  constexpr const char* op = "upsample_concat_backward";
  check(grad.dim() == 4, op, "grad must be 4-D (N, C + B * R, H, W), got ", grad.dim(), " dimensions");
  check_dtype(op, "grad", grad);
  check_bins(op, bins);
  const int64_t n = grad.size(0), height = grad.size(2), width = grad.size(3);
  check(height > 0 && width > 0, op, "grad must have pixels, got ", height, " x ", width);
  const bool channels_last = check_is_channels_last(op, "grad", grad);
  const bool with_x = std::find(order.begin(), order.end(), -1) != order.end();
  const int64_t upsampled = grad.size(1) - (with_x ? channels : 0), count = static_cast<int64_t>(bins.size());
  check(upsampled >= 0 && upsampled % count == 0, op, "grad must have C + B * R channels, got ", grad.size(1),
        " for C = ", channels, " and B = ", count);
  const int64_t reduced = upsampled / count;

  Layout layout(op, bins, order, channels, reduced);
  Tensor out = new_output(grad, {n, level_start(bins.data(), count), reduced});
  if (out.numel() == 0) {
    return out;
  }
  const UpsampleConcatBackward a{layout.over(dtype_of(grad), channels_last, reduced, height, width, align_corners),
                                 grad.const_data_ptr(), out.mutable_data_ptr()};
  const int64_t b = *std::max_element(bins.begin(), bins.end());
  run_kernel(PSPNET_FAST_KERNEL(upsample_concat_backward), a, n * a.level_count * whole_blocks(reduced),
             kChannelBlock * height * width, channels_last ? (b * b + b) * reduced : nchw_scratch(a));
  return out;
}

}  // namespace
}  // namespace pspnet_fast

PSPNET_FAST_KERNELS(CPU, m) {
  m.impl("upsample_concat_forward", TORCH_BOX(&pspnet_fast::upsample_concat_forward_cpu));
  m.impl("upsample_concat_backward", TORCH_BOX(&pspnet_fast::upsample_concat_backward_cpu));
}
