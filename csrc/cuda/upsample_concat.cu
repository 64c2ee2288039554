// upsample_concat in CUDA: tiles, launches, registration. The kernels: upsample_concat_forward.h and _backward.h.
// For two memory formats and both directions each tile has its own reasons, which makes this file as long as it is.

#include "../upsample_concat.h"

#include <algorithm>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/upsample_concat_backward.h"
#include "cuda/upsample_concat_forward.h"
#include "library.h"

namespace pspnet_fast::cuda {
namespace {

constexpr int64_t kTileElements = 16384;     // that a block writes, where there is enough work
constexpr int64_t kTileRows = 1024;          // taps of a tile's rows
constexpr int64_t kTileBytes = 48 * 1024;    // shared memory of a block: four and more fit on a multiprocessor
constexpr int64_t kStageBytes = 32 * 1024;   // of a gradient's planes, staged at once
constexpr int64_t kPlaneBytes = 64 * 1024;   // a plane up to this size is staged whole
constexpr int64_t kBlocksEach = 4;           // blocks that each multiprocessor gets before tiles grow
constexpr int kMaxLogStrips = 3;

// Levels [first, first + kConcatLevels), or as many as there are.
Concat concat_of(const char* op, const ConcatSizes& sizes, const std::vector<int64_t>& bins, size_t first,
                 bool align_corners) {
  Concat concat{};
  concat.images = narrow(op, "N", sizes.images);
  concat.reduced = narrow(op, "R", sizes.reduced);
  concat.total_channels = narrow(op, "C + B * R", sizes.blocks.total_channels);
  concat.height = narrow(op, "H", sizes.height);
  concat.width = narrow(op, "W", sizes.width);
  narrow(op, "H * W", sizes.height * sizes.width);
  concat.align_corners = align_corners;
  int64_t cells = 0, columns = 0;
  for (size_t k = 0; k < bins.size(); ++k) {
    narrow(op, "(2 * size + 1) * (bins + 1)", (2 * std::max(sizes.height, sizes.width) + 1) * (bins[k] + 1));
    if (k >= first && k < first + kConcatLevels) {
      concat.levels[concat.level_count++] = {static_cast<int>(bins[k]), narrow(op, "S", cells),
                                             static_cast<int>(sizes.blocks.first_channel[k]),
                                             static_cast<int>(columns)};
    }
    cells += bins[k] * bins[k];
    columns += bins[k];
  }
  concat.cells = narrow(op, "S", cells);
  concat.columns = static_cast<int>(columns);
  return concat;
}

int64_t most_bins(const Concat& concat) {
  int64_t most = 0;
  for (int k = 0; k < concat.level_count; ++k) {
    most = std::max<int64_t>(most, concat.levels[k].bins);
  }
  return most;
}

// Calls body with the largest of 4, 2 and 1 that divides W and to which the map's first element is aligned.
template <class T, class Body>
void with_group(const Tensor& map, Body body) {
  const auto fits = [&](int64_t group) {
    return map.size(3) % group == 0 && is_aligned(map.const_data_ptr(), group * static_cast<int64_t>(sizeof(T)));
  };
  if (fits(4)) {
    body(std::integral_constant<int, 4>{});
  } else if (fits(2)) {
    body(std::integral_constant<int, 2>{});
  } else {
    body(std::integral_constant<int, 1>{});
  }
}

// Calls body with the length of vectors along the channels: what fits into 16 bytes where every number in `counts` is a
// multiple of it and every pointer aligned, else 1.
template <class T, class Body>
void with_length(const std::vector<int64_t>& counts, std::initializer_list<const void*> pointers, Body body) {
  const bool whole = std::all_of(counts.begin(), counts.end(), [](int64_t count) { return count % kVector<T> == 0; }) &&
                     std::all_of(pointers.begin(), pointers.end(), [](const void* p) { return is_aligned(p); });
  if (whole) {
    body(std::integral_constant<int, kVector<T>>{});
  } else {
    body(std::integral_constant<int, 1>{});
  }
}

// How many rows of cells `rows` rows of pixels sample at most.
int64_t cell_rows_of(int64_t rows, int64_t height, int64_t bins) {
  return std::min(bins, rows == 1 ? 2 : rows * bins / height + 3);
}

// Where x is null, the levels alone.
template <class T>
void forward_nchw(const char* op, const Launcher& launch, Concat concat, const ConcatSizes& sizes, const Tensor* x,
                  const Tensor& pyramid, const Tensor& out) {
  const int64_t height = concat.height, width = concat.width, bins = most_bins(concat);
  int64_t columns = width, rows = std::min({height, std::max<int64_t>(1, kTileElements / width), kTileRows});
  int64_t planes = 1;
  if (rows == height) {
    planes = std::clamp<int64_t>(std::min(kTileElements / (height * width), kTileRows / height), 1,
                                 std::max(concat.reduced, 1));
  }
  const int64_t wanted = kBlocksEach * launch.device().multiprocessors;
  while (planes > 1 && concat.images * concat.level_count * divide_up(concat.reduced, planes) < wanted) {
    planes /= 2;
  }
  const auto shared_bytes = [&] {
    const int64_t table = planes * cell_rows_of(rows, height, bins) * columns;
    return (planes * rows + columns) * static_cast<int64_t>(sizeof(Tap)) + table * static_cast<int64_t>(sizeof(float));
  };
  while (shared_bytes() > kTileBytes) {
    if (planes > 1) {
      planes /= 2;
    } else if (rows > 1) {
      rows /= 2;
    } else {
      columns = divide_up(columns, 8) * 4;
    }
  }

  ForwardNchw<T> a{};
  a.concat = concat;
  if (x) {
    a.x = data<T>(*x);
    a.x_elements = sizes.channels * height * width;
    a.x_offset = sizes.blocks.x_first_channel * height * width;
    a.copy_blocks = narrow(op, "blocks of x",
                           divide_up(a.x_elements + kVector<T> - 1, kCopyBytes / static_cast<int64_t>(sizeof(T))));
  }
  a.pyramid = data<T>(pyramid);
  a.out = mutable_data<T>(out);
  a.planes = static_cast<int>(planes);
  a.rows = static_cast<int>(rows);
  a.columns = static_cast<int>(columns);
  a.plane_tiles = static_cast<int>(divide_up(concat.reduced, planes));
  a.row_tiles = static_cast<int>(divide_up(height, rows));
  a.column_tiles = static_cast<int>(divide_up(width, columns));
  a.by_columns = Divisor(columns);
  for (int k = 0; k < concat.level_count; ++k) {
    a.by_cell_rows[k] = Divisor(cell_rows_of(rows, height, concat.levels[k].bins));
  }
  const int64_t tiles = int64_t{a.plane_tiles} * a.row_tiles * a.column_tiles;
  const dim3 grid = grid_of(op, concat.images * (a.copy_blocks + tiles * concat.level_count));
  with_group<T>(out, [&](auto group) {
    launch(upsample_concat_forward_nchw_kernel<T, group>, grid, kConcatThreads, shared_bytes(), a);
  });
}

template <class T>
void forward_channels_last(const char* op, const Launcher& launch, Concat concat, const ConcatSizes& sizes,
                           const Tensor* x, const Tensor& pyramid, const Tensor& out) {
  ForwardChannelsLast<T> a{};
  a.concat = concat;
  a.pyramid = data<T>(pyramid);
  a.out = mutable_data<T>(out);
  std::vector<int64_t> counts = sizes.blocks.first_channel;
  counts.insert(counts.end(), {sizes.reduced, sizes.blocks.total_channels});
  if (x) {
    a.x = data<T>(*x);
    a.x_channels = static_cast<int>(sizes.channels);
    a.x_first_channel = static_cast<int>(sizes.blocks.x_first_channel);
    counts.insert(counts.end(), {sizes.channels, sizes.blocks.x_first_channel});
  }
  with_length<T>(counts, {a.x, a.pyramid, a.out}, [&](auto length) {
    const int64_t vectors = divide_up(concat.reduced, length);
    a.lanes = vectors <= 32 ? 32 : vectors <= 64 ? 64 : 128;
    a.x_tiles = static_cast<int>(divide_up(a.x_channels, int64_t{length} * a.lanes));
    a.level_tiles = static_cast<int>(divide_up(concat.reduced, int64_t{length} * a.lanes));
    a.row_tiles = static_cast<int>(divide_up(concat.height, kConcatThreads / a.lanes));
    const int64_t blocks = int64_t{concat.images} * a.row_tiles * (a.x_tiles + a.level_tiles * concat.level_count);
    int64_t parts = 1;
    while (blocks * parts < kBlocksEach * launch.device().multiprocessors && concat.width >= 16 * parts) {
      parts *= 2;
    }
    a.columns = static_cast<int>(divide_up(concat.width, parts));
    a.column_tiles = static_cast<int>(divide_up(concat.width, a.columns));
    launch(upsample_concat_forward_channels_last_kernel<T, length>, grid_of(op, blocks * a.column_tiles),
           kConcatThreads, kConcatThreads * sizeof(Tap), a);
  });
}

void write(const char* op, const Launcher& launch, const ConcatSizes& sizes, const Tensor* x, const Tensor& pyramid,
           const Tensor& out, const std::vector<int64_t>& bins, bool align_corners) {
  if (x && x->numel() == 0) {
    x = nullptr;
  }
  for (size_t first = 0; first < bins.size(); first += kConcatLevels, x = nullptr) {
    Concat concat = concat_of(op, sizes, bins, first, align_corners);
    if (concat.reduced == 0) {
      concat.level_count = 0;
    }
    if (concat.images == 0 || (concat.level_count == 0 && !x)) {
      continue;
    }
    dispatch_dtype(out.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      (sizes.channels_last ? forward_channels_last<T> : forward_nchw<T>)(op, launch, concat, sizes, x, pyramid, out);
    });
  }
}

Tensor upsample_concat_forward(const Tensor& x, const Tensor& pyramid, const std::vector<int64_t>& bins,
                               const std::vector<int64_t>& order, bool align_corners) {
  constexpr const char* op = "upsample_concat_forward";
  const ConcatSizes sizes = check_upsample_concat_forward(op, x, pyramid, bins, order);
  check_cuda_dtype(op, "x", x);
  const Launcher launch(op, x);
  Tensor out = new_tensor(x, {sizes.images, sizes.blocks.total_channels, sizes.height, sizes.width}, std::nullopt,
                          sizes.channels_last);
  write(op, launch, sizes, sizes.blocks.x_first_channel >= 0 ? &x : nullptr, pyramid, out, bins, align_corners);
  return out;
}

void upsample_concat_fill(Tensor out, const Tensor& pyramid, const std::vector<int64_t>& bins,
                          const std::vector<int64_t>& order, bool align_corners) {
  constexpr const char* op = "upsample_concat_fill";
  const ConcatSizes sizes = check_upsample_concat_fill(op, out, pyramid, bins, order);
  check_cuda_dtype(op, "out", out);
  const Launcher launch(op, out);
  write(op, launch, sizes, nullptr, pyramid, out, bins, align_corners);
}

template <class T>
void backward_nchw(const char* op, const Launcher& launch, const Concat& concat, const Tensor& grad,
                   const Tensor& out) {
  constexpr int64_t kSize = sizeof(T);
  const int64_t height = concat.height, width = concat.width, plane = height * width, bins = most_bins(concat);
  BackwardNchw<T> a{};
  a.concat = concat;
  a.grad = data<T>(grad);
  a.out = mutable_data<T>(out);
  int64_t planes = 1, band = height, strip_rows = 0;
  for (int k = 0; k < concat.level_count; ++k) {
    // By W alone, so that the order of the sums is everywhere the same.
    const int64_t threads = concat.levels[k].bins * divide_up(width, 4);
    while (a.log_strips[k] < kMaxLogStrips && (threads << a.log_strips[k]) < kConcatThreads / 2) {
      ++a.log_strips[k];
    }
    strip_rows = std::max<int64_t>(strip_rows, int64_t{concat.levels[k].bins} << a.log_strips[k]);
    a.by_bins[k] = Divisor(concat.levels[k].bins);
    a.by_cells[k] = Divisor(int64_t{concat.levels[k].bins} * concat.levels[k].bins);
  }
  if (plane * kSize > kPlaneBytes) {
    band = std::clamp<int64_t>(kStageBytes / (width * kSize), 1, height);
  } else {
    planes = std::clamp<int64_t>(kStageBytes / (plane * kSize + strip_rows * width), 1, concat.reduced);
  }
  while (planes > 1 && concat.images * concat.level_count * divide_up(concat.reduced, planes) <
                           kBlocksEach * launch.device().multiprocessors) {
    planes /= 2;
  }
  a.planes = static_cast<int>(planes);
  a.plane_tiles = static_cast<int>(divide_up(concat.reduced, planes));
  a.band = static_cast<int>(band);
  a.stage_bytes = narrow(op, "a band's bytes", divide_up(planes * band * width * kSize, kAccessBytes) * kAccessBytes +
                                                   kAccessBytes);
  a.bulk = launch.device().bulk_copies() && band == height;
  const int64_t bytes = kAccessBytes + 2 * bins * static_cast<int64_t>(sizeof(Support)) + a.stage_bytes +
                        (band + 1 + width + 1) * static_cast<int64_t>(sizeof(TapWeights)) +
                        planes * strip_rows * width * static_cast<int64_t>(sizeof(float));
  if (bytes > launch.device().shared_bytes) {
    const int64_t cells = concat.levels[concat.level_count - 1].first_cell - concat.levels[0].first_cell +
                          int64_t{concat.levels[concat.level_count - 1].bins} *
                              concat.levels[concat.level_count - 1].bins;
    launch(upsample_concat_backward_nchw_cells_kernel<T>,
           grid_of(op, divide_up(concat.images * cells * concat.reduced, kConcatWarps)), kConcatThreads, 0, a);
    return;
  }
  with_group<T>(grad, [&](auto group) {
    a.by_groups = Divisor(width / group);
    launch(upsample_concat_backward_nchw_kernel<T, group>,
           grid_of(op, int64_t{concat.images} * concat.level_count * a.plane_tiles), kConcatThreads, bytes, a);
  });
}

template <class T>
void backward_channels_last(const char* op, const Launcher& launch, const Concat& concat, const ConcatSizes& sizes,
                            const Tensor& grad, const Tensor& rows, const Tensor& out) {
  BackwardChannelsLast<T> a{};
  a.concat = concat;
  a.grad = data<T>(grad);
  a.rows = mutable_data<float>(rows);
  a.out = mutable_data<T>(out);
  std::vector<int64_t> counts = sizes.blocks.first_channel;
  counts.insert(counts.end(), {sizes.reduced, sizes.blocks.total_channels});
  constexpr int64_t kTaps = kConcatThreads * sizeof(Tap);
  with_length<T>(counts, {a.grad}, [&](auto length) {
    const int64_t column_bytes = int64_t{length} * kWarp * static_cast<int64_t>(sizeof(float));
    const int64_t bins = most_bins(concat);
    a.tiles = static_cast<int>(divide_up(concat.reduced, int64_t{length} * kWarp));
    a.split_columns = static_cast<int>(cell_rows_of(divide_up(concat.width, kConcatWarps), concat.width, bins));
    const bool split = concat.width >= 4 * kConcatWarps && kConcatWarps * a.split_columns * column_bytes <= kStageBytes;
    a.splits = split ? kConcatWarps : 1;
    const int64_t row_blocks = divide_up(int64_t{concat.images} * concat.height, kConcatWarps / a.splits);
    const int64_t bytes = kTaps + (split ? 2 * kConcatWarps * static_cast<int64_t>(sizeof(int)) +
                                               kConcatWarps * a.split_columns * column_bytes
                                         : 0);
    launch(upsample_concat_backward_rows_kernel<T, length>, grid_of(op, row_blocks * a.tiles * concat.level_count),
           kConcatThreads, bytes, a);
  });
  // The sums are float32: as many to a vector.
  const ConcatLevel& last = concat.levels[concat.level_count - 1];
  const int64_t cells = last.first_cell + int64_t{last.bins} * last.bins - concat.levels[0].first_cell;
  const auto sum_cells = [&](auto length) {
    a.tiles = static_cast<int>(divide_up(concat.reduced, int64_t{length} * kWarp));
    launch(upsample_concat_backward_cells_kernel<T, length>, grid_of(op, concat.images * cells * a.tiles),
           kConcatThreads, kConcatThreads * (2 + length) * sizeof(float), a);
  };
  if (concat.reduced % kVector<float> == 0) {
    sum_cells(std::integral_constant<int, kVector<float>>{});
  } else {
    sum_cells(std::integral_constant<int, 1>{});
  }
}

Tensor upsample_concat_backward(const Tensor& grad, int64_t channels, const std::vector<int64_t>& bins,
                                const std::vector<int64_t>& order, bool align_corners) {
  constexpr const char* op = "upsample_concat_backward";
  const ConcatSizes sizes = check_upsample_concat_backward(op, grad, channels, bins, order);
  check_cuda_dtype(op, "grad", grad);
  const Launcher launch(op, grad);
  const int64_t cells = level_start(bins.data(), static_cast<int64_t>(bins.size()));
  Tensor out = new_tensor(grad, {sizes.images, cells, sizes.reduced});
  if (out.numel() == 0) {
    return out;
  }
  std::optional<Tensor> rows;
  for (size_t first = 0; first < bins.size(); first += kConcatLevels) {
    const Concat concat = concat_of(op, sizes, bins, first, align_corners);
    if (sizes.channels_last && !rows) {
      rows = new_tensor(grad, {sizes.images, sizes.height, concat.columns, sizes.reduced}, ScalarType::Float);
    }
    dispatch_dtype(grad.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      if (sizes.channels_last) {
        backward_channels_last<T>(op, launch, concat, sizes, grad, *rows, out);
      } else {
        backward_nchw<T>(op, launch, concat, grad, out);
      }
    });
  }
  return out;
}

}  // namespace
}  // namespace pspnet_fast::cuda

PSPNET_FAST_KERNELS(PSPNET_FAST_CUDA_KEY, m) {
  m.impl("upsample_concat_forward", TORCH_BOX(&pspnet_fast::cuda::upsample_concat_forward));
  m.impl("upsample_concat_fill", TORCH_BOX(&pspnet_fast::cuda::upsample_concat_fill));
  m.impl("upsample_concat_backward", TORCH_BOX(&pspnet_fast::cuda::upsample_concat_backward));
}
