#include "cpu/pyramid_norm_kernels.h"
