// What the CPU and the CUDA version of upsample_concat share: argument checks, and where everything stands.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "checks.h"
#include "geometry.h"

namespace pspnet_fast {

// Where the blocks of the concatenation start.
struct ConcatBlocks {
  std::vector<int64_t> first_channel;  // of every level
  int64_t x_first_channel = -1;        // none: -1
  int64_t total_channels = 0;
};

inline ConcatBlocks concat_blocks(const char* op, const std::vector<int64_t>& bins, const std::vector<int64_t>& order,
                                  int64_t channels, int64_t reduced) {
  ConcatBlocks blocks{std::vector<int64_t>(bins.size(), -1)};
  for (const int64_t block : order) {
    check(block >= -1 && block < static_cast<int64_t>(bins.size()), op, "order must hold -1 and the levels, got ",
          to_string(order.data(), order.size()));
    int64_t& first = block == -1 ? blocks.x_first_channel : blocks.first_channel[static_cast<size_t>(block)];
    check(first == -1, op, "order must name a block once, got ", to_string(order.data(), order.size()));
    first = blocks.total_channels;
    blocks.total_channels += block == -1 ? channels : reduced;
  }
  for (const int64_t first : blocks.first_channel) {
    check(first >= 0, op, "order must name every level, got ", to_string(order.data(), order.size()));
  }
  return blocks;
}

// The sizes that an op's arguments, checked, come to.
struct ConcatSizes {
  int64_t images, channels, reduced, height, width;  // channels: x's
  bool channels_last;
  ConcatBlocks blocks;
};

// A map, x or the concatenation: 4-D, with pixels, in either memory format.
inline bool check_map(const char* op, const char* name, const char* axes, const Tensor& map,
                      const std::vector<int64_t>& bins) {
  check(map.dim() == 4, op, name, " must be 4-D ", axes, ", got ", map.dim(), " dimensions");
  check_dtype(op, name, map);
  check_bins(op, bins);
  check(map.size(2) > 0 && map.size(3) > 0, op, name, " must have pixels, got ", map.size(2), " x ", map.size(3));
  check_axes(op, name, map.size(2), map.size(3));
  return check_is_channels_last(op, name, map);
}

inline int64_t check_cells(const char* op, const Tensor& pyramid, const Tensor& map, const std::vector<int64_t>& bins) {
  check(pyramid.dim() == 3, op, "pyramid must be 3-D (N, S, R), got ", pyramid.dim(), " dimensions");
  const int64_t reduced = pyramid.size(2);
  check_like(op, "pyramid", pyramid, map);
  check_size(op, "pyramid", pyramid,
             {map.size(0), level_start(bins.data(), static_cast<int64_t>(bins.size())), reduced});
  check_contiguous(op, "pyramid", pyramid);
  return reduced;
}

inline ConcatSizes check_upsample_concat_forward(const char* op, const Tensor& x, const Tensor& pyramid,
                                                 const std::vector<int64_t>& bins, const std::vector<int64_t>& order) {
  const bool channels_last = check_map(op, "x", "(N, C, H, W)", x, bins);
  const int64_t reduced = check_cells(op, pyramid, x, bins);
  return {x.size(0),     x.size(1), reduced, x.size(2), x.size(3), channels_last,
          concat_blocks(op, bins, order, x.size(1), reduced)};
}

inline ConcatSizes check_upsample_concat_fill(const char* op, const Tensor& out, const Tensor& pyramid,
                                              const std::vector<int64_t>& bins, const std::vector<int64_t>& order) {
  const bool channels_last = check_map(op, "out", "(N, C + B * R, H, W)", out, bins);
  const int64_t reduced = check_cells(op, pyramid, out, bins);
  const int64_t channels = out.size(1) - static_cast<int64_t>(bins.size()) * reduced;  // what the levels leave for x
  ConcatSizes sizes{out.size(0), channels, reduced, out.size(2), out.size(3), channels_last,
                    concat_blocks(op, bins, order, channels, reduced)};
  check(channels >= 0 && sizes.blocks.total_channels == out.size(1), op, "out must have C + B * R channels, got ",
        out.size(1), " for R = ", reduced, " and B = ", bins.size());
  return sizes;
}

inline ConcatSizes check_upsample_concat_backward(const char* op, const Tensor& grad, int64_t channels,
                                                  const std::vector<int64_t>& bins, const std::vector<int64_t>& order) {
  const bool channels_last = check_map(op, "grad", "(N, C + B * R, H, W)", grad, bins);
  const bool with_x = std::find(order.begin(), order.end(), -1) != order.end();
  const int64_t upsampled = grad.size(1) - (with_x && channels >= 0 ? channels : 0), count = static_cast<int64_t>(bins.size());
  check(channels >= 0 && upsampled >= 0 && upsampled % count == 0, op, "grad must have C + B * R channels, got ", grad.size(1),
        " for C = ", channels, " and B = ", count);
  const int64_t reduced = upsampled / count;
  return {grad.size(0), channels,      reduced, grad.size(2), grad.size(3), channels_last,
          concat_blocks(op, bins, order, channels, reduced)};
}

}  // namespace pspnet_fast
