// upsample_softmax_add: dispatch, registration, and the scalar kernels.

#include "../upsample_softmax_add.h"

#include <vector>

#include "cpu/dispatch.h"
#include "cpu/make_taps.h"
#include "cpu/upsample_softmax_add.h"
#include "cpu/upsample_softmax_add_kernels.h"
#include "library.h"

namespace pspnet_fast {
namespace {

void upsample_softmax_add_forward_cpu(const Tensor& logits, Tensor total, const std::vector<int64_t>& corners,
                                      const std::vector<int64_t>& size, bool align_corners, bool flip, double weight) {
  const bool channels_last = check_upsample_softmax_add("upsample_softmax_add_forward", logits, total, corners, size);
  if (total.numel() == 0 || logits.size(0) == 0) {
    return;
  }
  const Dtype dtype = dtype_of(logits);
  const Taps rows(size[0], logits.size(2), align_corners, dtype);
  Taps columns(size[1], logits.size(3), align_corners, dtype);
  if (flip) {
    columns.mirror();
  }
  const UpsampleSoftmaxAdd a{dtype,
                             channels_last,
                             logits.size(0),
                             logits.size(1),
                             logits.size(2),
                             logits.size(3),
                             size[0],
                             size[1],
                             total.size(1),
                             total.size(2),
                             (whole_blocks(size[1]) + 1) * kChannelBlock,
                             (whole_blocks(logits.size(3)) + 1) * kChannelBlock,
                             rows.axis(),
                             columns.axis(),
                             corners.data(),
                             weight,
                             logits.const_data_ptr(),
                             static_cast<float*>(total.mutable_data_ptr())};
  run_kernel(PSPNET_FAST_KERNEL(upsample_softmax_add_forward), a, a.total_height, a.classes * a.width,
             softmax_scratch(a));
}

}  // namespace
}  // namespace pspnet_fast

PSPNET_FAST_KERNELS(CPU, m) {
  m.impl("upsample_softmax_add_forward", TORCH_BOX(&pspnet_fast::upsample_softmax_add_forward_cpu));
}
