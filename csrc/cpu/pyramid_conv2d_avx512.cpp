#include "cpu/pyramid_conv2d_kernels.h"
