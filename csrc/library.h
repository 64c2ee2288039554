// Where ops are registered: PSPNET_FAST_OPS(m) { schemas } once, PSPNET_FAST_KERNELS(CPU, m) { kernels } in each op's files.
#pragma once

#include <torch/csrc/stable/library.h>

// The emulation of CUDA in tests/emulation is a library of its own, with the same ops under another name.
#ifndef PSPNET_FAST_NAMESPACE
#define PSPNET_FAST_NAMESPACE pspnet_fast_native
#endif

// torch's macros paste their arguments, so names that are macros themselves need one more step.
#define PSPNET_FAST_OPS_IN(library, m) STABLE_TORCH_LIBRARY(library, m)
#define PSPNET_FAST_KERNELS_IN(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)
#define PSPNET_FAST_OPS(m) PSPNET_FAST_OPS_IN(PSPNET_FAST_NAMESPACE, m)
#define PSPNET_FAST_KERNELS(key, m) PSPNET_FAST_KERNELS_IN(PSPNET_FAST_NAMESPACE, key, m)

// The dispatch key of csrc/cuda.
#ifndef PSPNET_FAST_CUDA_KEY
#define PSPNET_FAST_CUDA_KEY CUDA
#endif
