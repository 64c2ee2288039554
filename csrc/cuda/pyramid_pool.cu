// pyramid_pool: the launchers and their registration.
//
// One read of x for all levels: NCHW by whole planes (pyramid_pool_planes.h), channels_last by blocks of pixels
// (pyramid_pool_pixels.h). What no table holds goes the plain way (pyramid_pool_direct.h), correct for all sizes. Three
// ways, each there and back, make the file as long as it is.

#include "pyramid_pool.h"

#include <algorithm>
#include <limits>
#include <tuple>

#include "cuda/launch.h"
#include "cuda/pyramid_pool_direct.h"
#include "cuda/pyramid_pool_pixels.h"
#include "cuda/pyramid_pool_planes.h"
#include "cuda/pyramid_pool_planes_backward.h"
#include "library.h"

namespace pspnet_fast::cuda {
namespace {

constexpr int64_t kInt = std::numeric_limits<int32_t>::max();

struct Tables {
  PoolAxis rows, columns;
  PoolLevels levels;
};

// An axis' segments, none longer than `longest`, or than the least multiple of it with which they are few enough.
std::optional<PoolAxis> make_axis(int64_t size, const std::vector<int64_t>& bins, int64_t longest) {
  const std::vector<int64_t> starts = axis_edges(size, bins);
  if (size > std::numeric_limits<uint16_t>::max() || starts.size() > kPoolSegments + 1) {
    return std::nullopt;
  }
  std::vector<int64_t> edges;
  for (;; longest *= 2) {
    edges = {0};
    for (size_t s = 0; s + 1 < starts.size(); ++s) {
      const int64_t length = starts[s + 1] - starts[s], parts = divide_up(length, longest);
      for (int64_t part = 1; part <= parts; ++part) {
        edges.push_back(starts[s] + part * length / parts);
      }
    }
    if (edges.size() <= kPoolSegments + 1) {
      break;
    }
  }
  PoolAxis axis{static_cast<int>(edges.size()) - 1, {}, {}, {}};
  std::copy(edges.begin(), edges.end(), axis.edges);
  int window = 0;
  for (const int64_t b : bins) {
    for (int64_t i = 0; i < b; ++i, ++window) {
      axis.first[window] = static_cast<uint8_t>(segment_at(edges, bin_start(i, size, b)));
      axis.end[window] = static_cast<uint8_t>(segment_at(edges, bin_end(i, size, b)));
    }
  }
  return axis;
}

std::optional<Tables> make_tables(const PoolSizes& sizes, const std::vector<int64_t>& bins, int64_t longest) {
  int64_t windows = 0;
  for (const int64_t b : bins) {
    windows += std::min<int64_t>(b, kPoolWindows + 1);
  }
  if (bins.size() > kPoolLevels || windows > kPoolWindows || sizes.height * sizes.width > kInt || sizes.c > kInt) {
    return std::nullopt;
  }
  const auto rows = make_axis(sizes.height, bins, longest), columns = make_axis(sizes.width, bins, longest);
  if (!rows || !columns) {
    return std::nullopt;
  }
  PoolLevels levels{};
  for (const int64_t b : bins) {
    const int level = levels.levels++;
    levels.bins[level] = static_cast<int>(b);
    levels.first_cell[level] = levels.cells;
    levels.first_window[level] = levels.windows;
    levels.by_bins[level] = Divisor(b);
    levels.cells += static_cast<int>(b * b);
    levels.windows += static_cast<int>(b);
  }
  return Tables{*rows, *columns, levels};
}

// How an image's planes become items of at most kItemBytes.
struct Items {
  int64_t group, bands, band_rows;
};

Items make_items(const PoolSizes& sizes, int64_t element, int64_t most_planes) {
  const int64_t row = sizes.width * element, plane = sizes.height * row;
  if (plane > kItemBytes) {
    const int64_t bands = divide_up(sizes.height, kItemBytes / row), band_rows = divide_up(sizes.height, bands);
    return {1, divide_up(sizes.height, band_rows), band_rows};
  }
  constexpr int64_t kMostPlanes = 32;
  const int64_t group = std::min({sizes.c, kItemBytes / plane, most_planes, kMostPlanes});
  return {std::max<int64_t>(group, 1), 1, sizes.height};
}

int to_int(int64_t value) {
  return static_cast<int>(value);
}

dim3 grid_of(int64_t blocks, const char* op) {
  check(blocks <= kInt, op, "more than 2^31 blocks of threads are needed, got ", blocks);
  return dim3(static_cast<unsigned>(blocks));
}

// False if the planes kernel does not take these sizes on this card.
template <class T>
bool pool_planes(const Launcher& launch, const Tensor& x, const PoolSizes& sizes, const Tables& tables, void* y,
                 T* copy, int64_t copy_image) {
  constexpr int64_t kFloats = 2048;  // what blocks and column sums may take for several planes at once
  const auto [n, c, height, width, cells, channels_last] = sizes;
  const int64_t segments = tables.rows.segments, blocks = segments * tables.columns.segments;
  if (width * static_cast<int64_t>(sizeof(T)) > kItemBytes || n * c > kInt) {
    return false;
  }
  const Items items = make_items(sizes, sizeof(T), kFloats / blocks);
  constexpr int64_t kBatch = 8;  // planes whose cells fill a sector of 32 bytes in float32
  const int64_t batch = items.group * std::max<int64_t>(1, std::min(kBatch, kFloats / blocks) / items.group);
  const int64_t pitch = width | 1;  // odd: rows begin in different banks
  const int64_t sum_rows = std::clamp<int64_t>(kFloats / pitch, 1, items.group * segments);
  const int64_t floats = sum_rows * pitch + batch * blocks + batch * segments * tables.levels.windows;
  const int64_t shared = kPlanesStages * kStageBytes + (kPlanesStages + 1) * static_cast<int64_t>(sizeof(Barrier)) +
                         floats * static_cast<int64_t>(sizeof(float)) + 2 * static_cast<int64_t>(sizeof(PoolAxis));
  if (shared > launch.device().shared_bytes || batch * cells > kInt) {
    return false;
  }
  constexpr int64_t kBlocksEach = 4, kReserved = 1024;  // of shared memory in each block, by CUDA
  const int64_t fit = (launch.device().shared_bytes + kReserved) / (shared + kReserved);
  const int64_t each = std::clamp<int64_t>(fit, 1, kBlocksEach);
  const int64_t units_per_image = divide_up(c, items.group), units = n * units_per_image;
  const int64_t grid = std::min(units, each * launch.device().multiprocessors);
  PoolPlanes a{};
  a.rows = tables.rows;
  a.columns = tables.columns;
  a.levels = tables.levels;
  a.x = data<T>(x);
  a.y = y;
  a.copy = copy;
  a.elements = x.numel();
  a.copy_image = copy_image;
  a.channels = to_int(c);
  a.height = to_int(height);
  a.width = to_int(width);
  a.plane = to_int(height * width);
  a.bulk = launch.device().bulk_copies();
  a.group = to_int(items.group);
  a.bands = to_int(items.bands);
  a.band_rows = to_int(items.band_rows);
  a.units_each = to_int(units / grid);
  a.units_more = to_int(units % grid);
  a.batch = to_int(batch);
  a.sum_rows = to_int(sum_rows);
  a.pitch = to_int(pitch);
  a.by_units_per_image = Divisor(units_per_image);
  a.by_width = Divisor(width);
  a.by_segments_of_rows = Divisor(segments);
  a.by_segments_of_columns = Divisor(tables.columns.segments);
  a.by_windows = Divisor(tables.levels.windows);
  a.by_batch = Divisor(batch);
  launch(pyramid_pool_planes_kernel<T>, dim3(static_cast<unsigned>(grid)), kPlanesThreads, static_cast<size_t>(shared),
         a);
  return true;
}

PoolPixels make_pixels(const PoolSizes& sizes, const Tables& tables) {
  PoolPixels a{};
  a.rows = tables.rows;
  a.columns = tables.columns;
  a.levels = tables.levels;
  a.channels = to_int(sizes.c);
  a.height = to_int(sizes.height);
  a.width = to_int(sizes.width);
  a.by_columns = Divisor(tables.columns.segments);
  a.by_rows = Divisor(tables.rows.segments);
  a.by_cells = Divisor(tables.levels.cells);
  a.by_height = Divisor(sizes.height);
  a.by_width = Divisor(sizes.width);
  return a;
}

template <class T, int V, class Kernel>
void launch_pixels(const char* op, const Launcher& launch, Kernel kernel, const PoolSizes& sizes, PoolPixels& a) {
  const int64_t tiles = divide_up(sizes.c, V * kPixelLanes);
  a.by_tiles = Divisor(tiles);
  launch(kernel, grid_of(sizes.n * a.rows.segments * a.columns.segments * tiles, op), kPixelThreads,
         kPixelThreads * V * sizeof(float), a);
}

// Whether pixels can be read and written 16 bytes at a time.
template <class T>
bool by_vectors(const void* pointer, int64_t image, int64_t pixel) {
  return is_aligned(pointer) && image % kVector<T> == 0 && pixel % kVector<T> == 0;
}

template <class T>
void pool_pixels(const char* op, const Launcher& launch, const Tensor& x, const PoolSizes& sizes, const Tables& tables,
                 void* y, T* copy, int64_t copy_channels) {
  const auto [n, c, height, width, cells, channels_last] = sizes;
  PoolPixels a = make_pixels(sizes, tables);
  const Tensor blocks = new_tensor(x, {n, a.rows.segments, a.columns.segments, c}, ScalarType::Float);
  a.from = data<T>(x);
  a.to = copy;
  a.blocks = mutable_data<float>(blocks);
  a.y = y;
  a.from_image = height * width * c;
  a.to_image = height * width * copy_channels;
  a.from_pixel = to_int(c);
  a.to_pixel = to_int(copy_channels);
  if (by_vectors<T>(a.from, a.from_image, c) && by_vectors<T>(copy, a.to_image, copy_channels)) {
    launch_pixels<T, kVector<T>>(op, launch, pyramid_pool_pixels_kernel<T, kVector<T>>, sizes, a);
  } else {
    launch_pixels<T, 1>(op, launch, pyramid_pool_pixels_kernel<T, 1>, sizes, a);
  }
  const int64_t tiles = divide_up(c, kWarp);
  a.by_tiles = Divisor(tiles);
  launch(pyramid_pool_cells_kernel<T>, grid_of(n * cells * tiles, op), kCellThreads, kCellThreads * sizeof(float), a);
}

PoolDirect make_direct(const PoolSizes& sizes) {
  const auto [n, c, height, width, cells, channels_last] = sizes;
  PoolDirect a{};
  a.cells = cells;
  a.channels = c;
  a.height = height;
  a.width = width;
  a.channels_last = channels_last;
  a.image = c * height * width;
  a.channel = channels_last ? 1 : height * width;
  a.row = channels_last ? width * c : width;
  a.column = channels_last ? c : 1;
  return a;
}

// Calls body(levels of bins from `first` on) for as many levels at a time as a kernel takes.
template <class Body>
void for_levels(PoolDirect& a, const std::vector<int64_t>& bins, Body body) {
  for (size_t first = 0; first < bins.size(); first += kDirectLevels) {
    a.first_cell = level_start(bins.data(), static_cast<int64_t>(first));
    a.levels = to_int(std::min<int64_t>(kDirectLevels, static_cast<int64_t>(bins.size() - first)));
    std::copy_n(bins.begin() + static_cast<int64_t>(first), a.levels, a.bins);
    body(first + kDirectLevels >= bins.size());
  }
}

template <class T>
void pool_directly(const char* op, const Launcher& launch, const Tensor& x, const PoolSizes& sizes,
                   const std::vector<int64_t>& bins, void* y) {
  PoolDirect a = make_direct(sizes);
  a.from = data<T>(x);
  a.to = y;
  for_levels(a, bins, [&](bool) {
    a.elements = sizes.n * sizes.c * level_start(a.bins, a.levels);
    launch(pyramid_pool_direct_kernel<T>, grid_of(divide_up(a.elements, kDirectThreads), op), kDirectThreads, 0, a);
  });
}

// `out` is given for a copy of x into its channels from `first_channel` on.
Tensor pool(const char* op, const Tensor& x, const std::vector<int64_t>& bins, const PoolSizes& sizes, Tensor* out,
            int64_t first_channel) {
  const auto [n, c, height, width, cells, channels_last] = sizes;
  Tensor y = new_tensor(x, {n, cells, c});
  if (x.numel() == 0) {
    return y;
  }
  const Launcher launch(op, x);
  constexpr int64_t kLongest = 16;
  const auto tables = make_tables(sizes, bins, channels_last ? kLongest : kInt);
  const int64_t channels = out == nullptr ? 0 : out->size(1);
  const int64_t offset = first_channel * (channels_last ? 1 : height * width);
  bool done = false;
  dispatch_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    T* const copy = out == nullptr ? nullptr : mutable_data<T>(*out) + offset;
    if (tables && channels_last && channels <= kInt) {
      pool_pixels<T>(op, launch, x, sizes, *tables, y.mutable_data_ptr(), copy, channels);
      done = true;
    } else if (tables && !channels_last) {
      done = pool_planes<T>(launch, x, sizes, *tables, y.mutable_data_ptr(), copy, channels * height * width);
    }
    if (!done) {
      pool_directly<T>(op, launch, x, sizes, bins, y.mutable_data_ptr());
    }
  });
  if (!done && out != nullptr) {
    Tensor slice = torch::stable::narrow(*out, 1, first_channel, c);
    torch::stable::copy_(slice, x);
  }
  return y;
}

Tensor pyramid_pool_forward(const Tensor& x, const std::vector<int64_t>& bins) {
  constexpr const char* op = "pyramid_pool_forward";
  const PoolSizes sizes = check_pyramid_pool(op, x, bins);
  check_cuda_dtype(op, "x", x);
  return pool(op, x, bins, sizes, nullptr, 0);
}

std::tuple<Tensor, Tensor> pyramid_pool_concat(const Tensor& x, const std::vector<int64_t>& bins, int64_t channels,
                                               int64_t first_channel) {
  constexpr const char* op = "pyramid_pool_concat";
  const PoolSizes sizes = check_pyramid_pool_concat(op, x, bins, channels, first_channel);
  check_cuda_dtype(op, "x", x);
  Tensor out = new_tensor(x, {sizes.n, channels, sizes.height, sizes.width}, std::nullopt, sizes.channels_last);
  Tensor y = pool(op, x, bins, sizes, &out, first_channel);
  return {y, out};
}

// grad_input's strides: from image to image, and in channels_last from pixel to pixel.
struct Input {
  const void* data;
  int64_t image, pixel;
};

// False if the planes kernel does not take these sizes on this card.
template <class T>
bool spread_planes(const char* op, const Launcher& launch, const void* grad, const Input& input, const PoolSizes& sizes,
                   const Tables& tables, void* out) {
  constexpr int64_t kCells = 4096;  // that several planes may have
  const auto [n, c, height, width, cells, channels_last] = sizes;
  if (width * static_cast<int64_t>(sizeof(T)) > kItemBytes) {
    return false;
  }
  const Items items = make_items(sizes, sizeof(T), kCells / cells);
  const int64_t segments = tables.rows.segments;
  const int64_t share_rows = items.bands > 1 ? std::min(segments, items.band_rows) : items.group * segments;
  const int64_t pitch = width + divide_up(width, kVector<T>);
  const int64_t rows = items.group * items.band_rows + 1;  // one more for those who look ahead
  const int64_t shared = (items.group * cells + share_rows * pitch) * static_cast<int64_t>(sizeof(float)) +
                         2 * static_cast<int64_t>(sizeof(PoolAxis)) + rows * static_cast<int64_t>(sizeof(uint16_t));
  const int64_t units_per_image = divide_up(c, items.group), blocks = n * units_per_image * items.bands;
  if (shared > launch.device().shared_bytes || blocks > kInt) {
    return false;
  }
  PoolPlanesBackward a{};
  a.rows = tables.rows;
  a.columns = tables.columns;
  a.levels = tables.levels;
  a.grad = grad;
  a.grad_input = input.data;
  a.out = out;
  a.grad_input_image = input.image;
  a.channels = to_int(c);
  a.height = to_int(height);
  a.width = to_int(width);
  a.plane = to_int(height * width);
  a.group = to_int(items.group);
  a.bands = to_int(items.bands);
  a.band_rows = to_int(items.band_rows);
  a.pitch = to_int(pitch);
  a.share_rows = to_int(share_rows);
  a.by_units_per_image = Divisor(units_per_image);
  a.by_bands = Divisor(items.bands);
  a.by_group = Divisor(items.group);
  a.by_height = Divisor(height);
  a.by_width = Divisor(width);
  a.by_segments_of_rows = Divisor(segments);
  a.by_segments_of_columns = Divisor(tables.columns.segments);
  launch(pyramid_pool_planes_backward_kernel<T>, grid_of(blocks, op), kAddThreads, static_cast<size_t>(shared), a);
  return true;
}

template <class T>
void spread_pixels(const char* op, const Launcher& launch, const void* grad, const Input& input, const PoolSizes& sizes,
                   const Tables& tables, void* out) {
  const int64_t c = sizes.c;
  PoolPixels a = make_pixels(sizes, tables);
  a.from = input.data;
  a.to = out;
  a.grad = grad;
  a.from_image = input.image;
  a.to_image = sizes.height * sizes.width * c;
  a.from_pixel = to_int(input.pixel);
  a.to_pixel = to_int(c);
  if (by_vectors<T>(input.data, input.image, input.pixel) && by_vectors<T>(out, a.to_image, c) && is_aligned(grad)) {
    launch_pixels<T, kVector<T>>(op, launch, pyramid_pool_pixels_backward_kernel<T, kVector<T>>, sizes, a);
  } else {
    launch_pixels<T, 1>(op, launch, pyramid_pool_pixels_backward_kernel<T, 1>, sizes, a);
  }
}

template <class T>
void spread_directly(const char* op, const Launcher& launch, const Tensor& grad, const Input& input,
                     const PoolSizes& sizes, const std::vector<int64_t>& bins, void* out) {
  PoolDirect a = make_direct(sizes);
  a.elements = sizes.n * sizes.c * sizes.height * sizes.width;
  a.from = data<T>(grad);
  a.to = out;
  a.grad_input = input.data;
  a.image = input.image;
  if (sizes.channels_last) {
    a.row = sizes.width * input.pixel;
    a.column = input.pixel;
  }
  std::optional<Tensor> partial;
  if (bins.size() > kDirectLevels) {
    partial = new_tensor(grad, {a.elements}, ScalarType::Float);
  }
  for_levels(a, bins, [&](bool last) {
    a.before = a.first_cell == 0 ? nullptr : mutable_data<float>(*partial);
    a.after = last ? nullptr : mutable_data<float>(*partial);
    const dim3 grid = grid_of(divide_up(a.elements, kDirectThreads), op);
    launch(pyramid_pool_direct_backward_kernel<T>, grid, kDirectThreads, 0, a);
  });
}

Tensor pyramid_pool_backward(const Tensor& grad, const std::optional<Tensor>& grad_input,
                             const std::vector<int64_t>& size, const std::vector<int64_t>& bins, bool channels_last) {
  constexpr const char* op = "pyramid_pool_backward";
  const PoolSizes sizes = check_pyramid_pool_backward(op, grad, grad_input, size, bins, channels_last);
  check_cuda_dtype(op, "grad", grad);
  Tensor out = new_tensor(grad, {sizes.n, sizes.c, sizes.height, sizes.width}, std::nullopt, channels_last);
  if (out.numel() == 0) {
    return out;
  }
  const Launcher launch(op, grad);
  constexpr int64_t kLongest = 16;
  const auto tables = make_tables(sizes, bins, channels_last ? kLongest : kInt);
  Input input{nullptr, 0, 0};
  if (grad_input) {
    // A single column's stride says nothing: rows are as far apart as pixels then.
    input = {grad_input->const_data_ptr(), grad_input->stride(0), grad_input->stride(sizes.width > 1 ? 3 : 2)};
  }
  dispatch_dtype(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    void* const to = out.mutable_data_ptr();
    if (tables && channels_last && input.pixel <= kInt) {
      spread_pixels<T>(op, launch, data<T>(grad), input, sizes, *tables, to);
    } else if (!tables || channels_last || !spread_planes<T>(op, launch, data<T>(grad), input, sizes, *tables, to)) {
      spread_directly<T>(op, launch, grad, input, sizes, bins, to);
    }
  });
  return out;
}

}  // namespace
}  // namespace pspnet_fast::cuda

PSPNET_FAST_KERNELS(PSPNET_FAST_CUDA_KEY, m) {
  m.impl("pyramid_pool_forward", TORCH_BOX(&pspnet_fast::cuda::pyramid_pool_forward));
  m.impl("pyramid_pool_concat", TORCH_BOX(&pspnet_fast::cuda::pyramid_pool_concat));
  m.impl("pyramid_pool_backward", TORCH_BOX(&pspnet_fast::cuda::pyramid_pool_backward));
}
