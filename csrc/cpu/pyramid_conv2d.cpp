// pyramid_conv2d: dispatch, registration, and the scalar kernels.

#include "../pyramid_conv2d.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/pyramid_conv2d.h"
#include "cpu/pyramid_conv2d_kernels.h"
#include "library.h"

namespace pspnet_fast {
namespace {

// A sparse matrix, entry by entry, then row by row: its own or, transposed, its columns'.
class Matrix {
 public:
  void add(int64_t row, int64_t column, double weight) { entries_.push_back({row, {column, weight}}); }

  void transpose() {
    for (auto& [row, term] : entries_) {
      std::swap(row, term.source);
    }
  }

  Sums sums(int64_t rows) {
    std::stable_sort(entries_.begin(), entries_.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    start_.assign(1, 0);
    for (const auto& [row, term] : entries_) {
      while (static_cast<int64_t>(start_.size()) <= row) {
        start_.push_back(static_cast<int64_t>(terms_.size()));
      }
      terms_.push_back(term);
    }
    start_.resize(static_cast<size_t>(rows) + 1, static_cast<int64_t>(terms_.size()));
    return {start_.data(), terms_.data()};
  }

 private:
  std::vector<std::pair<int64_t, Term>> entries_;
  std::vector<int64_t> start_;
  std::vector<Term> terms_;
};

// How the two axes are summed. The bands stand level after level, row of cells after row, dy after dy.
class Summation {
 public:
  Summation(const Conv2dSizes& sizes, const std::vector<int64_t>& bins, Dtype dtype, bool backward)
      : along_w_(bins.size()) {
    const int64_t k = sizes.kernel_size;
    const bool wide = dtype == Dtype::float64;
    int64_t first_cell = 0, first_band = 0;
    for (size_t level = 0; level < bins.size(); ++level) {
      const int64_t b = bins[level];
      for (int64_t i = 0; i < b; ++i) {
        for (int64_t dy = 0; dy < k; ++dy) {
          bands_.push_back({(first_cell + i * b) * k * k + dy * k, b, static_cast<int64_t>(level)});
        }
      }
      for (int64_t d = 0; d < k; ++d) {
        const int64_t shift = d - sizes.padding;
        for (int64_t h = 0; h < sizes.rows; ++h) {
          for_each_tap(h + shift, sizes.height, b, sizes.align_corners, wide,
                       [&](int64_t i, double weight) { along_h_.add(h, first_band + i * k + d, weight); });
        }
        for (int64_t w = 0; w < sizes.columns; ++w) {
          for_each_tap(w + shift, sizes.width, b, sizes.align_corners, wide, [&](int64_t j, double weight) {
            along_w_[level].add(w, backward ? j * k + d : j * k * k + d, weight);
          });
        }
      }
      first_cell += b * b;
      first_band += b * k;
      if (backward) {
        along_w_[level].transpose();
      }
      along_w_sums_.push_back(along_w_[level].sums(backward ? b * k : sizes.columns));
    }
    if (backward) {
      along_h_.transpose();
    }
    arguments_ = {dtype,
                  sizes.channels_last,
                  sizes.images,
                  sizes.channels,
                  sizes.rows,
                  sizes.columns,
                  sizes.cells * k * k,
                  k,
                  bands_.data(),
                  first_band,
                  along_w_sums_.data(),
                  along_h_.sums(backward ? first_band : sizes.rows),
                  whole_blocks(sizes.columns) * kChannelBlock};
  }

  const PyramidConv2d& arguments() const { return arguments_; }

  template <class Kernel, class Arguments>
  void run(Kernel kernel, const Arguments& a) const {
    const int64_t scratch = a.channels_last ? a.band_count * a.columns * kConv2dChannels
                                            : (a.band_count + 1) * a.pitch * kChannelBlock;
    run_kernel(kernel, a, a.images * whole_blocks(a.channels), kChannelBlock * a.rows * a.columns, scratch);
  }

 private:
  std::vector<Band> bands_;
  std::vector<Matrix> along_w_;
  std::vector<Sums> along_w_sums_;
  Matrix along_h_;
  PyramidConv2d arguments_;
};

void pyramid_conv2d_forward_cpu(Tensor out, const Tensor& taps, const std::optional<Tensor>& scale,
                                const std::optional<Tensor>& shift, bool add, bool relu,
                                const std::vector<int64_t>& size, const std::vector<int64_t>& bins,
                                int64_t kernel_size, int64_t padding, bool align_corners) {
  constexpr const char* op = "pyramid_conv2d_forward";
  const Conv2dSizes sizes = check_conv2d_map(op, "out", out, size, bins, kernel_size, padding, align_corners);
  check_conv2d_taps(op, taps, out, sizes);
  const void* const scales = check_conv2d_factor(op, "scale", scale, out, sizes);
  const void* const shifts = check_conv2d_factor(op, "shift", shift, out, sizes);
  if (out.numel() == 0) {
    return;
  }
  const Summation summation(sizes, bins, dtype_of(out), false);
  const PyramidConv2dForward a{
      summation.arguments(), taps.const_data_ptr(), scales, shifts, out.mutable_data_ptr(), add, relu};
  summation.run(PSPNET_FAST_KERNEL(pyramid_conv2d_forward), a);
}

Tensor pyramid_conv2d_backward_cpu(const Tensor& grad, const std::vector<int64_t>& size,
                                   const std::vector<int64_t>& bins, int64_t kernel_size, int64_t padding,
                                   bool align_corners) {
  constexpr const char* op = "pyramid_conv2d_backward";
  const Conv2dSizes sizes = check_conv2d_map(op, "grad", grad, size, bins, kernel_size, padding, align_corners);
  Tensor taps = torch::stable::new_empty(grad, {sizes.images, sizes.cells, kernel_size * kernel_size, sizes.channels},
                                         accumulator_of(grad));
  if (taps.numel() == 0) {
    return taps;
  }
  const Summation summation(sizes, bins, dtype_of(grad), true);
  const PyramidConv2dBackward a{summation.arguments(), grad.const_data_ptr(), taps.mutable_data_ptr()};
  summation.run(PSPNET_FAST_KERNEL(pyramid_conv2d_backward), a);
  return taps;
}

}  // namespace
}  // namespace pspnet_fast

PSPNET_FAST_KERNELS(CPU, m) {
  m.impl("pyramid_conv2d_forward", TORCH_BOX(&pspnet_fast::pyramid_conv2d_forward_cpu));
  m.impl("pyramid_conv2d_backward", TORCH_BOX(&pspnet_fast::pyramid_conv2d_backward_cpu));
}
