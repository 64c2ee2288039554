#include "cpu/upsample_argmax_kernels.h"
