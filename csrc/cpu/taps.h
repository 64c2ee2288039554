// The taps of an axis as kernels take them: runs of pixels that sample the same two cells, and every pixel's fraction.
#pragma once

#include <cstdint>

namespace pspnet_fast {

// Pixels [begin, end) of an axis: they sample the same two cells.
struct TapRun {
  int64_t begin, end, lower, upper;
};

struct TapAxis {
  const TapRun* runs;
  int64_t run_count;
  const double* fraction;  // of the upper cell, for every pixel; already rounded to the accumulator's type
};

namespace {

inline const TapRun* find_run(const TapAxis& axis, int64_t pixel) {
  const TapRun* run = axis.runs;
  while (run->end <= pixel) {
    ++run;
  }
  return run;
}

}  // namespace
}  // namespace pspnet_fast
