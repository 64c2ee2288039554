// pyramid_project on the CPU: what pyramid_project.cpp prepares for the kernels of pyramid_project_kernels.h.
#pragma once

#include "cpu/kernel.h"

namespace pspnet_fast {

constexpr int64_t kProjectRows = 6;             // rows of a product that one tile holds in registers
constexpr int64_t kProjectStripBytes = 256;     // channels of the backward that one unit of work owns, as accumulators
constexpr int64_t kProjectSumsBytes = 1 << 17;  // sums that stay in L2
constexpr int64_t kProjectBlock = 32;           // channels that one unit of packing owns; as rows of a weight, and the
                                                // pages they lie in, few enough for L1 and the TLB

struct PyramidProject {
  Dtype dtype;
  int64_t images, channels, reduced;
  const int64_t* bins;
  int64_t level_count, cells;  // of all levels together, in one image
  const void* pyramid;
  const void* const* weight;  // of each level
};

struct PyramidProjectForward : PyramidProject {
  const void* scale;  // or null
  const void* shift;  // or null
  bool relu;
  void* packed;  // accumulators: the cells of each level, transposed
  void* out;
};

struct PyramidProjectBackward : PyramidProject {
  const void* grad;
  void* grad_rows;         // accumulators: grad, level by level, kProjectBlock channels of all cells together
  void* grad_columns;      // accumulators: each level of grad transposed
  int64_t padded_reduced;  // grad_rows' channels: whole blocks of kProjectBlock
  void* d_pyramid;
  void* d_weight;
  bool stream;  // d_weight is written past the caches
};

// Units of work [begin, end): blocks of channels, tiles of rows of the weights, blocks of reduced channels, and twice
// strips of channels. `scratch` holds kProjectSumsBytes, or a strip for every cell of the largest level where that is
// more.
PSPNET_FAST_DECLARE_KERNEL(pyramid_project_pack, const PyramidProjectForward& a, int64_t begin, int64_t end)
PSPNET_FAST_DECLARE_KERNEL(pyramid_project_forward, const PyramidProjectForward& a, int64_t begin, int64_t end)
PSPNET_FAST_DECLARE_KERNEL(pyramid_project_pack_grad, const PyramidProjectBackward& a, int64_t begin, int64_t end)
PSPNET_FAST_DECLARE_KERNEL(pyramid_project_d_pyramid, const PyramidProjectBackward& a, int64_t begin, int64_t end,
                           void* scratch)
PSPNET_FAST_DECLARE_KERNEL(pyramid_project_d_weight, const PyramidProjectBackward& a, int64_t begin, int64_t end,
                           void* scratch)

}  // namespace pspnet_fast
