#include "cpu/upsample_cross_entropy_kernels.h"
