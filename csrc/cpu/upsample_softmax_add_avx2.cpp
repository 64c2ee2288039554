#include "cpu/upsample_softmax_add_kernels.h"
