// pyramid_project on the GPU: launchers and registration. The kernels stand in pyramid_project_kernels.h, the maths in
// pspnet_fast/ops/pyramid_project.py.
//
// At N = 1 there is little to read but the weights, and too few tiles of rows to read them fast: the forward's channels
// are split over kBlocks blocks, whose float32 parts a second kernel adds in a fixed order.

#include "pyramid_project.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/launch.h"
#include "cuda/pyramid_project_kernels.h"
#include "library.h"

namespace pspnet_fast::cuda {
namespace {

using namespace project;

// About two blocks for each multiprocessor of the largest GPUs; a constant, so that every GPU gives the same bits.
constexpr int64_t kBlocks = 256, kMostSplits = 16;

// Numbers of rows and of columns are 32-bit in the kernels, to the end of a tile that goes beyond.
void check_counts(const char* op, const PyramidProjectSizes& sizes) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 2 * kSide;
  check(sizes.images * sizes.cells <= kMost && sizes.channels <= kMost && sizes.reduced <= 65535 * kSide, op,
        "pyramid is too large for the cuda backend, with N, S, C, R = ", sizes.images, ", ", sizes.cells, ", ",
        sizes.channels, ", ", sizes.reduced);
}

int64_t row_tiles(int64_t images, const std::vector<int64_t>& bins) {
  int64_t tiles = 0;
  for (const int64_t b : bins) {
    tiles += divide_up(images * b * b, kSide);
  }
  return tiles;
}

// body(levels, bins) for every kLevels levels, those with most rows first: a weight's gradient is so much work as its
// level has rows, and what takes longest shall not begin last.
template <class T, class Body>
void for_each_group(const PyramidProjectSizes& sizes, const std::vector<Tensor>& weight,
                    const std::vector<int64_t>& bins, Body body) {
  std::vector<size_t> order(bins.size());
  for (size_t k = 0; k < order.size(); ++k) {
    order[k] = k;
  }
  std::stable_sort(order.begin(), order.end(), [&bins](size_t i, size_t j) { return bins[i] > bins[j]; });
  for (size_t first = 0; first < order.size(); first += kLevels) {
    Levels<T> levels{};
    std::vector<int64_t> group;
    for (size_t i = first; i < std::min(first + kLevels, order.size()); ++i) {
      const size_t k = order[i];
      const int64_t cells = bins[k] * bins[k];
      levels.at[i - first] = {data<T>(weight[k]), Divisor(cells),
                              static_cast<int>(level_start(bins.data(), static_cast<int64_t>(k))),
                              static_cast<int>(sizes.images * cells), static_cast<int>(k)};
      group.push_back(bins[k]);
    }
    levels.channels = sizes.channels;
    levels.reduced = sizes.reduced;
    levels.cells = sizes.cells;
    body(levels, group);
  }
}

// Whether every row of so many columns can be read and written by 16 bytes.
bool aligned_rows(const Tensor& matrix, int64_t columns) {
  const int64_t bytes = columns * static_cast<int64_t>(matrix.element_size());
  return bytes % kAccessBytes == 0 && is_aligned(matrix.const_data_ptr());
}

bool aligned_rows(const std::vector<Tensor>& matrices, int64_t columns) {
  return std::all_of(matrices.begin(), matrices.end(), [columns](const Tensor& m) { return aligned_rows(m, columns); });
}

Tensor pyramid_project_forward(const Tensor& pyramid, const std::vector<Tensor>& weight,
                               const std::vector<int64_t>& bins, const std::optional<Tensor>& scale,
                               const std::optional<Tensor>& shift, bool relu) {
  constexpr const char* op = "pyramid_project_forward";
  check_cuda_dtype(op, "pyramid", pyramid);
  const PyramidProjectSizes sizes = check_pyramid_project(op, pyramid, weight, bins);
  check_counts(op, sizes);
  const Epilogue epilogue{static_cast<const float*>(check_per_channel(op, "scale", scale, pyramid, sizes)),
                          static_cast<const float*>(check_per_channel(op, "shift", shift, pyramid, sizes)), relu};
  const Launcher launch(op, pyramid);
  const Tensor out = new_tensor(pyramid, {sizes.images, sizes.cells, sizes.reduced});
  if (out.numel() == 0) {
    return out;
  }
  const int64_t depth = 128 / static_cast<int64_t>(pyramid.element_size());
  const int64_t tiles = divide_up(sizes.channels, depth), r_blocks = divide_up(sizes.reduced, kSide);
  const int64_t wanted = std::clamp(kBlocks / (row_tiles(sizes.images, bins) * r_blocks), int64_t{1}, kMostSplits);
  const int64_t tiles_per_split = divide_up(tiles, wanted), splits = divide_up(tiles, tiles_per_split);
  std::optional<Tensor> parts;
  if (splits > 1) {
    parts = new_tensor(pyramid, {splits, sizes.images, sizes.cells, sizes.reduced}, ScalarType::Float);
  }
  dispatch_dtype(pyramid.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    for_each_group<T>(sizes, weight, bins, [&](const Levels<T>& levels, const std::vector<int64_t>& group) {
      Forward<T> a{levels, data<T>(pyramid), mutable_data<T>(out)};
      a.parts = parts ? mutable_data<float>(*parts) : nullptr;
      a.part = out.numel();
      a.epilogue = epilogue;
      a.tiles_per_split = static_cast<int>(tiles_per_split);
      a.aligned_pyramid = aligned_rows(pyramid, sizes.channels);
      a.aligned_weight = aligned_rows(weight, sizes.channels);
      a.aligned_out = aligned_rows(out, sizes.reduced);
      a.aligned_parts = parts && aligned_rows(*parts, sizes.reduced);
      const dim3 grid(static_cast<unsigned>(row_tiles(sizes.images, group)), static_cast<unsigned>(r_blocks),
                      static_cast<unsigned>(splits));
      launch(pyramid_project_forward_kernel<T>, grid, kThreads, kSharedBytes, a);
      if (parts) {
        const int width = a.aligned_parts ? 4 : 1;
        int64_t rows = 0;
        for (const int64_t b : group) {
          rows += sizes.images * b * b;
        }
        launch(width == 4 ? pyramid_project_sum_kernel<T, 4> : pyramid_project_sum_kernel<T, 1>,
               dim3(static_cast<unsigned>(rows), static_cast<unsigned>(divide_up(sizes.reduced, kSumThreads * width))),
               kSumThreads, 0, a, static_cast<int>(splits));
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> pyramid_project_backward(const Tensor& grad, const Tensor& pyramid,
                                                    const std::vector<Tensor>& weight,
                                                    const std::vector<int64_t>& bins) {
  constexpr const char* op = "pyramid_project_backward";
  check_cuda_dtype(op, "pyramid", pyramid);
  const PyramidProjectSizes sizes = check_pyramid_project(op, pyramid, weight, bins);
  check_counts(op, sizes);
  check_projected(op, "grad", grad, pyramid, sizes);
  const Launcher launch(op, pyramid);
  const Tensor d_pyramid = new_tensor(pyramid, {sizes.images, sizes.cells, sizes.channels});
  Tensor d_weight = new_tensor(pyramid, {sizes.levels, sizes.reduced, sizes.channels});
  if (sizes.images == 0) {
    return {d_pyramid, torch::stable::zero_(d_weight)};
  }
  dispatch_dtype(pyramid.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    for_each_group<T>(sizes, weight, bins, [&](const Levels<T>& levels, const std::vector<int64_t>& group) {
      Backward<T> a{levels, data<T>(grad), data<T>(pyramid), mutable_data<T>(d_pyramid), mutable_data<T>(d_weight)};
      a.row_tiles = static_cast<int>(row_tiles(sizes.images, group));
      a.c_blocks = static_cast<int>(divide_up(sizes.channels, kSide));
      a.r_blocks = static_cast<int>(divide_up(sizes.reduced, kSide));
      a.aligned_grad = aligned_rows(grad, sizes.reduced);
      a.aligned_pyramid = aligned_rows(pyramid, sizes.channels);
      a.aligned_weight = aligned_rows(weight, sizes.channels);
      a.aligned_d_pyramid = aligned_rows(d_pyramid, sizes.channels);
      a.aligned_d_weight = aligned_rows(d_weight, sizes.channels);
      const int64_t weight_blocks = int64_t{a.c_blocks} * a.r_blocks * static_cast<int64_t>(group.size());
      const dim3 grid(static_cast<unsigned>(int64_t{a.row_tiles} * a.c_blocks + weight_blocks));
      launch(pyramid_project_backward_kernel<T>, grid, kThreads, kSharedBytes, a);
    });
  });
  return {d_pyramid, d_weight};
}

}  // namespace
}  // namespace pspnet_fast::cuda

PSPNET_FAST_KERNELS(PSPNET_FAST_CUDA_KEY, m) {
  m.impl("pyramid_project_forward", TORCH_BOX(&pspnet_fast::cuda::pyramid_project_forward));
  m.impl("pyramid_project_backward", TORCH_BOX(&pspnet_fast::cuda::pyramid_project_backward));
}
