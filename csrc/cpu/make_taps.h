// The taps of an axis, made. For dispatching files: kernels see cpu/taps.h alone.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/kernel.h"
#include "cpu/taps.h"
#include "geometry.h"

namespace pspnet_fast {

class Taps {
 public:
  Taps(int64_t size, int64_t cells, bool align_corners, Dtype dtype) {
    for (int64_t i = 0; i < size; ++i) {
      const BilinearTap tap = bilinear_tap(i, size, cells, align_corners);
      if (runs_.empty() || runs_.back().lower != tap.lower) {
        runs_.push_back({i, i, tap.lower, tap.upper});
      }
      runs_.back().end = i + 1;
      fraction_.push_back(dtype == Dtype::float64
                              ? static_cast<double>(tap.numerator) / static_cast<double>(tap.denominator)
                              : static_cast<float>(tap.numerator) / static_cast<float>(tap.denominator));
    }
  }

  // Last pixel first.
  void mirror() {
    const auto size = static_cast<int64_t>(fraction_.size());
    for (TapRun& run : runs_) {
      run = {size - run.end, size - run.begin, run.lower, run.upper};
    }
    std::reverse(runs_.begin(), runs_.end());
    std::reverse(fraction_.begin(), fraction_.end());
  }

  TapAxis axis() const { return {runs_.data(), static_cast<int64_t>(runs_.size()), fraction_.data()}; }

 private:
  std::vector<TapRun> runs_;
  std::vector<double> fraction_;
};

}  // namespace pspnet_fast
