// The kernels of pyramid_project, compiled once for each instruction set (vec.h).
#pragma once

#include "cpu/pyramid_project_backward.h"
#include "cpu/pyramid_project_forward.h"

namespace pspnet_fast {
namespace PSPNET_FAST_CAPABILITY {

void pyramid_project_pack(const PyramidProjectForward& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto zero) { pack<decltype(zero)>(a, begin, end); });
}

void pyramid_project_forward(const PyramidProjectForward& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto zero) { forward<decltype(zero)>(a, begin, end); });
}

void pyramid_project_pack_grad(const PyramidProjectBackward& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto zero) { pack_grad<decltype(zero)>(a, begin, end); });
}

void pyramid_project_d_pyramid(const PyramidProjectBackward& a, int64_t begin, int64_t end, void* scratch) {
  with_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    d_pyramid<T>(a, begin, end, static_cast<Accumulator<T>*>(scratch));
  });
}

void pyramid_project_d_weight(const PyramidProjectBackward& a, int64_t begin, int64_t end, void* scratch) {
  with_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    d_weight<T>(a, begin, end, static_cast<Accumulator<T>*>(scratch));
  });
}

}  // namespace PSPNET_FAST_CAPABILITY
}  // namespace pspnet_fast
