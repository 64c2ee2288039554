// Blocks of channels: how a kernel walks its units, and how the planes of NCHW become vectors along C, and back.
#pragma once

#include "cpu/vec.h"

namespace pspnet_fast {
namespace {

// Units [begin, end) are blocks of channels, group after group of `channels` channels. Calls
// body(group, first channel, count) for stretches of at most `most` channels of a group.
template <class Body>
inline void for_each_stretch(int64_t begin, int64_t end, int64_t channels, int64_t most, Body body) {
  const int64_t blocks = (channels + kChannelBlock - 1) / kChannelBlock;
  while (begin < end) {
    const int64_t group = begin / blocks, first = begin - group * blocks;
    const int64_t stop = first + end - begin < blocks ? first + end - begin : blocks;
    const int64_t last = stop * kChannelBlock < channels ? stop * kChannelBlock : channels;
    for (int64_t channel = first * kChannelBlock; channel < last; channel += most) {
      body(group, channel, channel + most < last ? most : last - channel);
    }
    begin += stop - first;
  }
}

// One row of each plane, pitch apart, to one vector for each column. Lanes from `planes` on repeat the first plane.
template <class A>
inline void rows_to_columns(const A* rows, int64_t pitch, int64_t planes, int64_t width, A* columns) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t w = 0; w < width; w += lanes) {
    Vec<A> tile[lanes];
    for (int64_t plane = 0; plane < lanes; ++plane) {
      tile[plane] = load(rows + (plane < planes ? plane : 0) * pitch + w);
    }
    transpose<A>(tile);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      store(columns + (w + lane) * lanes, tile[lane]);
    }
  }
}

// column(w), a vector for each column, to one row of each plane, pitch apart. Columns are asked for in order, the last
// one again where the width ends within a vector.
template <class A, class Column>
inline void columns_to_rows(Column column, int64_t width, A* rows, int64_t pitch) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t w = 0; w < width; w += lanes) {
    Vec<A> tile[lanes];
    for (int64_t lane = 0; lane < lanes; ++lane) {
      tile[lane] = column(w + lane < width ? w + lane : width - 1);
    }
    transpose<A>(tile);
    for (int64_t plane = 0; plane < lanes; ++plane) {
      store(rows + plane * pitch + w, tile[plane]);
    }
  }
}

}  // namespace
}  // namespace pspnet_fast
