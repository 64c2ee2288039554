#include "cpu/pyramid_pool_kernels.h"
